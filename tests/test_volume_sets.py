"""Folders of volumes as sets: what is read, how it is divided, what is refused."""

import json

import numpy as np
import pytest
from miniature_volumes import PATIENTS, ball, write_volumes

from medmatting.checks import InputError
from medmatting.registry import DataError
from medmatting.simnod_set import save_case, simnod_set
from medmatting.volume_sets import Samples, volume_set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return volume_set(write_volumes(tmp_path_factory.mktemp("volumes") / "set"))


def test_a_case_is_what_was_written_and_only_accepted_cases_are_there(data):
    assert len(data.digests) == PATIENTS + 1 and "left_out" not in data.digests and "solver's output" in data.says
    case = data.case("P03_123451_nodule1")
    hu, alpha, masks = ball(4)
    np.testing.assert_allclose(case.ct.array, hu)
    np.testing.assert_array_equal(case.masks, masks)
    np.testing.assert_allclose(case.alpha, alpha)


def test_no_patient_is_in_two_parts(data):
    assert len(data.splits) == 4 and len({split.test for split in data.splits}) > 1
    for split in data.splits:
        parts = [{case.split("_")[0] for case in part} for part in (split.train, split.validation, split.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == PATIENTS
        assert {"P00_123450_nodule1", "P00_123451_nodule2"} <= set(max((split.train, split.validation, split.test), key=lambda p: "P00_123450_nodule1" in p))


def test_nodules_of_the_package_keep_to_their_patient(tmp_path):
    folder = write_volumes(tmp_path / "set", patients=22)
    names = {"P03_123451_nodule1": "LIDC-IDRI-0003_nodule2", "P04_123451_nodule1": "LIDC-IDRI-0003_nodule3", "P05_123451_nodule1": "LIDC-IDRI-0003_123456_nodule1"}
    table = (folder / "cases.csv").read_text()
    for old, new in names.items():
        table = table.replace(old, new)
    (folder / "cases.csv").write_text(table)
    for split in volume_set(folder, repeats=8).splits:
        assert any(set(names.values()) <= set(part) for part in (split.train, split.validation, split.test))


def test_samples_are_kept_as_long_as_memory_allows(data):
    cases = data.split(0).train
    one = Samples(data, cases)[0]
    size = sum(value.nbytes for key, value in one.items() if key != "name")
    few = Samples(data, cases, memory_gb=1.5 * size / 1e9)
    assert few[0] is few[0] and few[1] is not few[1] and few[1]["name"] == cases[1]
    assert all((few[1][key] == Samples(data, cases)[1][key]).all() for key in one if key != "name")


def test_a_changed_alpha_is_refused(tmp_path):
    folder = write_volumes(tmp_path / "set")
    (folder / "P03_123451_nodule1" / "alpha.nii.gz").write_bytes((folder / "P04_123451_nodule1" / "alpha.nii.gz").read_bytes())
    with pytest.raises(InputError, match="not as it was written"):
        volume_set(folder).case("P03_123451_nodule1")


@pytest.mark.parametrize("change", [dict(spacing=0.7), dict(unit="")])
def test_other_voxels_and_other_units_are_refused(tmp_path, change):
    data = volume_set(write_volumes(tmp_path / "set", **change))
    with pytest.raises(InputError, match="HU on a grid of 0.5 mm"):
        data.case("P03_123451_nodule1")


def test_a_case_that_was_not_accepted_is_refused(data):
    for name in ("left_out", "nobody"):
        with pytest.raises(InputError, match=name):
            data.case(name)


def test_folders_that_are_no_set(tmp_path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "nodules.csv").write_text("nodule\n")
    for folder, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "no cases are"), (tmp_path / "archive", "cases without alpha"),
                            (write_volumes(tmp_path / "few", patients=3), "at least two cases in each part")):
        with pytest.raises(InputError, match=message):
            volume_set(folder)


def test_simulated_cases_bring_patient_and_seed_and_damage_is_named(tmp_path):
    planned = simnod_set(1, seed=3, folder=tmp_path).planned[0]
    from medmatting.simnod_set import make_case

    save_case(planned, make_case(planned), tmp_path)
    record = json.loads((tmp_path / planned.name / "case.json").read_text())
    for number in range(1, 16):  # the same case under other names: only records are read here
        (tmp_path / f"case{number:02d}").mkdir()
        (tmp_path / f"case{number:02d}" / "case.json").write_text(json.dumps({**record, "name": f"case{number:02d}", "patient": f"P{number}"}))
    data = volume_set(tmp_path)
    assert data.says.startswith("simulated: 16") and data.case(planned.name).masks.shape == (4, 64, 64, 64)
    with pytest.raises(DataError):
        data.case("case01")
    (tmp_path / "case01" / "case.json").write_text(json.dumps({**record, "name": "case01", "seed": 4}))
    with pytest.raises(InputError, match="cases of the seeds 3, 4"):
        volume_set(tmp_path)
    (tmp_path / "case01" / "case.json").write_text("{")
    with pytest.raises(InputError, match="damaged case.json"):
        volume_set(tmp_path)
