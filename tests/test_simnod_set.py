"""A data set of simulated nodules: planned from a seed, exact, whole on disk or not there, no patient on two sides."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from medmatting import lidc, simnod, simnod_set
from medmatting.checks import InputError, WriteError
from medmatting.files import read
from medmatting.registry import DataError

ALL_KEPT = "0 made, {} kept, 0 made anew, 0 failed"


@pytest.fixture(scope="module")
def composed() -> list:
    "One case of each kind, and one of the larger cubes."
    planned = simnod_set.plan(4, seed=1) + simnod_set.plan(1, seed=1, side=96)
    return [(one, simnod_set.make_case(one)) for one in planned]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> simnod_set.SimnodSet:
    dataset = simnod_set.simnod_set(4, seed=1, folder=tmp_path_factory.mktemp("set"))
    assert not simnod_set.generate(dataset, progress=False).failed
    return dataset


@pytest.fixture
def copy(made, tmp_path) -> simnod_set.SimnodSet:
    "The set in a folder that a test may damage."
    import shutil

    shutil.copytree(made.folder, tmp_path / "copy")
    return simnod_set.SimnodSet(tmp_path / "copy", made.planned)


def test_image_is_the_mixture_with_the_alpha_of_the_file(composed, made):
    for planned, case in composed:
        mixed = case.alpha.astype(float) * case.foreground + (1.0 - case.alpha) * case.background
        assert np.abs(case.ct.array - case.noise - mixed).max() < 1e-3
        assert np.array_equal(case.alpha * 2.0**16, np.round(case.alpha * 2.0**16)) and 0 <= case.alpha.min() <= case.alpha.max() <= 1
        assert case.ct.shape == (planned.side,) * 3 and case.ct.spacing == (0.5,) * 3 and case.pleural == planned.pleural
    for stored, (_, case) in zip(made, composed[:4]):
        assert np.array_equal(stored.alpha, case.alpha) and np.array_equal(stored.masks, case.masks)
        assert stored.image.array.dtype == np.int16 and np.abs(stored.image.array - case.ct.array).max() <= 0.5
        assert stored.image.unit == "HU" and stored.image.spacing == pytest.approx((0.5,) * 3)


def test_masks_are_those_of_the_readers_in_the_middle_of_the_cube(composed):
    for planned, case in composed:
        real = lidc.shape(planned.index)
        cut = 0.2 if planned.pleural else 0.75  # nearest sampling of slices up to 3 mm apart
        volume = real.masks.sum((1, 2, 3)) * np.prod(real.spacing) * 8
        assert ((case.masks.sum((1, 2, 3)) / volume > cut) & (case.masks.sum((1, 2, 3)) / volume < 1.25)).all()
        border = np.ones(case.alpha.shape, bool)
        border[4:-4, 4:-4, 4:-4] = False
        assert not case.masks[:, border].any() and case.alpha[border].max() < 0.05
        if not planned.pleural:
            span = [np.flatnonzero(case.masks.any(0).any(axis)) for axis in ((1, 2), (0, 2), (0, 1))]
            assert all(abs((s[0] + s[-1]) / 2 - (planned.side - 1) / 2) < 4 for s in span)


def test_a_pleural_nodule_touches_the_wall_and_stays_inside_the_lung(composed):
    for planned, case in composed:
        if planned.pleural:
            whole = simnod_set.outlines(planned.index, planned.side)[1]
            assert (case.masks <= whole).all() and case.masks.any(0).sum() < whole.any(0).sum() and case.masks.all(0).any()


@pytest.fixture(scope="module")
def measured() -> dict:
    "Appearance of simulated cases by texture, and of the real nodules by name."
    planned = [one for one in simnod_set.plan(24, seed=7) if not one.pleural][:9]
    simulated = {texture: [] for texture in simnod.TEXTURES}
    for one in planned:
        case = simnod_set.make_case(one)
        simulated[one.texture].append(simnod.appearance(case.ct, case.masks))
    return simulated | {name: simnod.appearance(*simnod.real_nodule(name)) for name in lidc.nodules()}


SOLID = ("LIDC-IDRI-0001_nodule1", "LIDC-IDRI-0003_nodule3", "LIDC-IDRI-0003_nodule4")
GLASS = ("LIDC-IDRI-0002_nodule1", "LIDC-IDRI-0003_nodule1")


def test_edges_and_cores_are_those_of_real_nodules(measured):
    mean = lambda texture, name: np.nanmean([case[name] for case in measured[texture]])
    span = lambda names, name: (np.nanmin([measured[n][name] for n in names]), np.nanmax([measured[n][name] for n in names]))
    for name in (name for name in measured[SOLID[0]] if name.startswith("profile")):
        for texture, real, slack in (("solid", SOLID, 70), ("ground glass", GLASS, 70)):
            low, high = span(real, name)
            assert low - slack < mean(texture, name) < high + slack, (texture, name)
    steps = [mean("solid", name) for name in measured[SOLID[0]] if name.startswith("profile")]
    assert 200 < steps[3] - steps[2] < 480 and np.all(np.diff(steps) > -15)  # HU per mm at the border: 254 to 298 in the real ones
    assert -60 < mean("solid", "core_hu") < 60 and -760 < mean("ground glass", "core_hu") < -560
    assert mean("ground glass", "core_hu") < mean("part-solid", "core_hu") < mean("solid", "core_hu")


def test_noise_is_that_of_real_scans(measured):
    simulated = [case for texture in simnod.TEXTURES for case in measured[texture]]
    for name in ("lung_noise_hu", "core_noise_hu"):
        real = np.nanmedian([measured[n][name] for n in lidc.nodules()])
        assert 0.6 < np.nanmedian([case[name] for case in simulated]) / real < 1.7, name


def test_readers_agree_as_those_of_all_897(measured):
    simulated = [case for texture in simnod.TEXTURES for case in measured[texture]]
    assert abs(np.mean([case["dice"] for case in simulated]) - 0.773) < 0.083 and abs(np.mean([case["iou"] for case in simulated]) - 0.444) < 0.133


def test_readers_of_50_outlines_agree_and_vary_as_those_of_all_897():
    found = []
    for one in simnod_set.plan(50, seed=3):
        masks = simnod_set.outlines(one.index, one.side)[1]
        dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in combinations(masks, 2)]
        found.append((np.mean(dice), masks.all(0).sum() / masks.any(0).sum()))
    (dice, overlap), (dice_spread, overlap_spread) = np.mean(found, 0), np.std(found, 0, ddof=1)
    assert abs(dice - 0.773) < 0.035 and 0.75 < dice_spread / 0.083 < 1.33
    assert abs(overlap - 0.444) < 0.055 and 0.75 < overlap_spread / 0.133 < 1.33


def test_background_is_a_turned_piece_of_the_scan_and_nothing_is_filled_in():
    for block in simnod_set.lung_blocks()[::7]:
        values = block.ct.array
        for side in simnod_set.SIDES:
            centres, depth = simnod_set._centres(block, side)
            assert len(centres) == len(depth) > 0
            for centre in (centres[0], centres[-1]):  # corners of what is allowed
                cube, lung = simnod_set._cube(block, centre, side, np.random.default_rng(0))
                assert np.isfinite(cube.array).all() and values.min() <= cube.array.min() and cube.array.max() <= values.max()
                assert lung.any() and cube.shape == lung.shape == (side,) * 3
    with pytest.raises(InputError, match="lung"):
        simnod_set._cube(block, centres[0] + [3.0, 0, 0], side, np.random.default_rng(0))


def test_every_turn_shows_the_same_lung():
    block = simnod_set.lung_blocks()[0]
    centre = simnod_set._centres(block, 64)[0][0]
    cubes = [simnod_set._cube(block, centre, 64, np.random.default_rng(seed))[0].array for seed in range(8)]
    assert len({cube.tobytes() for cube in cubes}) > 3
    for cube in cubes:
        assert np.abs(np.sort(cube, axis=None) - np.sort(cubes[0], axis=None)).max() < 0.1


def test_seed_and_number_decide_everything_and_shorter_plans_begin_longer_ones():
    planned = simnod_set.plan(120, seed=5)
    assert simnod_set.plan(30, seed=5) == planned[:30] and simnod_set.plan(30, seed=6) != planned[:30]
    first, again = (simnod_set.make_case(planned[1]) for _ in range(2))
    assert np.array_equal(first.ct.array, again.ct.array) and first.lung == again.lung
    kinds = [(one.texture, one.pleural) for one in planned]
    assert kinds.count(("solid", False)) + kinds.count(("solid", True)) == 60 and sum(pleural for _, pleural in kinds) == 30
    glass = [one.index for one in planned if one.texture == "ground glass"]
    rows = simnod_set.usable_shapes(64)["ground glass"]
    assert len(glass) == 30 and sorted(set(glass[: len(rows)])) == sorted(glass[: len(rows)]) and set(glass) <= set(rows)


def test_no_patient_on_both_sides_and_splits_are_seven_one_two():
    dataset = simnod_set.simnod_set(200, seed=2, folder="nowhere")
    for separate in (False, True):
        made = simnod_set.splits(dataset, separate_lungs=separate)
        assert made == simnod_set.splits(dataset, separate_lungs=separate) and len({fold.test for fold in made}) == 4
        for fold in made:
            people = [{dataset.patients[case] for case in part} for part in (fold.train, fold.validation, fold.test)]
            assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
            if separate:
                lungs = [{one.scan for one in dataset.planned if one.name in part} for part in (fold.train, fold.test)]
                assert not lungs[0] & lungs[1]
            else:
                total = len(set(dataset.patients.values()))
                assert [len(group) / total for group in people] == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
                assert len(fold.train) + len(fold.validation) + len(fold.test) == 200


def test_a_second_run_keeps_everything(made):
    before = {path: path.stat().st_mtime_ns for path in made.folder.glob("simnod*/*")}
    assert str(simnod_set.generate(made, progress=False)) == ALL_KEPT.format(4)
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.glob("simnod*/*")}


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda place: flip(place / "alpha.nii.gz"), lambda place: flip(place / "rater3.nii.gz"), lambda place: (place / "image.nii.gz").unlink(),
    lambda place: (place / "case.json").write_text("{"), lambda place: (place / "case.json").unlink(),
    lambda place: (place / "case.json").write_text((place / "case.json").read_text().replace('"solid"', '"part-solid"')),
    lambda place: (place / "case.json").write_text((place / "case.json").read_text().replace('"generator": 1', '"generator": 0')),
], ids=["alpha", "rater", "missing file", "cut record", "no record", "other record", "older generator"])  # fmt: skip
def test_a_damaged_case_is_refused_by_name_and_made_anew(copy, damage):
    good = copy[0]
    place = copy.folder / good.name
    damage(place)
    with pytest.raises(DataError, match=good.name):
        simnod_set.check_case(place, copy.planned[0])
    assert np.array_equal(copy[0].alpha, good.alpha)  # made on demand
    damage(place)
    done = simnod_set.generate(copy, progress=False)
    assert done.outcomes[good.name] == "made anew" and str(done) == "0 made, 3 kept, 1 made anew, 0 failed"
    assert np.array_equal(copy[0].image.array, good.image.array)


def test_a_table_does_not_hide_a_damaged_record(copy):
    (copy.folder / copy.planned[2].name / "case.json").write_text("[]")
    with pytest.raises(DataError, match=copy.planned[2].name):
        copy.table()


def test_files_of_others_are_never_removed(copy):
    place = copy.folder / copy.planned[0].name
    (place / "my notes.txt").write_text("mine")
    flip(place / "alpha.nii.gz")
    done = simnod_set.generate(copy, progress=False)
    assert "my notes.txt" in done.failed[copy.planned[0].name] and str(done).endswith("1 failed") and (place / "my notes.txt").read_text() == "mine"
    assert copy.planned[0].name not in (copy.folder / "simnod64-1.csv").read_text()


def test_a_full_disk_stops_the_run_and_leaves_no_half_case(tmp_path, monkeypatch):
    dataset, calls = simnod_set.simnod_set(3, seed=1, folder=tmp_path), []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 11:  # in the middle of the second case
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left.*nothing was left behind.*1 of 3"):
        simnod_set.generate(dataset, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [dataset.planned[0].name]
    monkeypatch.undo()
    assert str(simnod_set.generate(dataset, progress=False)) == "2 made, 1 kept, 0 made anew, 0 failed"


def test_one_bad_case_does_not_stop_the_rest(tmp_path, monkeypatch):
    dataset, make = simnod_set.simnod_set(3, seed=1, folder=tmp_path), simnod_set.make_case
    fail = lambda planned: 1 / 0 if planned.number == 1 else make(planned)
    monkeypatch.setattr(simnod_set, "make_case", fail)
    done = simnod_set.generate(dataset, progress=False)
    assert list(done.failed) == [dataset.planned[1].name] and "ZeroDivisionError" in done.failed[dataset.planned[1].name]
    assert list(dataset.table().index) == [dataset.planned[0].name, dataset.planned[2].name]


def test_two_processes_make_what_one_makes(made, tmp_path):
    dataset = simnod_set.simnod_set(4, seed=1, folder=tmp_path)
    code = (f"from medmatting.simnod_set import generate, simnod_set\nif __name__ == '__main__':\n"
            f"    print(generate(simnod_set(4, seed=1, folder={str(tmp_path)!r}), jobs=2, progress=False))")
    script = tmp_path / "two.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4 made, 0 kept, 0 made anew, 0 failed"
    for one, other in zip(dataset, made):
        assert np.array_equal(one.image.array, other.image.array) and np.array_equal(one.alpha, other.alpha)


def test_two_runs_on_one_folder_agree(tmp_path):
    dataset = simnod_set.simnod_set(2, seed=1, folder=tmp_path)
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: simnod_set.generate(dataset, progress=False), range(2)))
    assert not any(run.failed for run in runs) and str(simnod_set.generate(dataset, progress=False)) == ALL_KEPT.format(2)
    assert not list(tmp_path.glob(".simnod*"))


def test_the_folder_is_read_without_this_package(made):
    import pandas as pd

    table = pd.read_csv(made.folder / "simnod64-1.csv", index_col="case")
    assert list(table.index) == [one.name for one in made.planned] and list(table.texture) == [one.texture for one in made.planned]
    readme = (made.folder / "README.md").read_text()
    assert "SIMULATED" in readme and "CC BY 3.0" in readme and "Armato" in readme
    place = made.folder / made.planned[0].name
    assert sorted(path.name for path in place.iterdir()) == sorted([f"{name}.nii.gz" for name in simnod_set.ARRAYS] + ["case.json"])
    trimap, masks = read(place / "trimap.nii.gz").array, [read(place / f"rater{k}.nii.gz").array for k in (1, 2, 3, 4)]
    assert set(np.unique(trimap)) == {0, 128, 255} and (np.min(masks, 0)[trimap == 255] == 1).all() and not np.max(masks, 0)[trimap == 0].any()


def test_table_names_the_splits_of_larger_sets(tmp_path, made):
    import shutil

    dataset = simnod_set.simnod_set(60, seed=1, folder=tmp_path)
    shutil.copytree(made.folder / made.planned[0].name, tmp_path / made.planned[0].name)
    table = dataset.table()
    assert len(table) == 1 and all(table[f"split_{k}"].iloc[0] in ("train", "validation", "test") for k in range(4))


def test_the_command_for_batches_reads_the_folder(made):
    from medmatting.cli import case_words

    words = case_words(made.folder / made.planned[0].name)
    assert Path(words[0]).name == "image.nii.gz" and [Path(word).name for word in words[2:]] == [f"rater{k}.nii.gz" for k in (1, 2, 3, 4)]


@pytest.mark.parametrize("call, word", [
    (lambda: simnod_set.plan(0), "cases"), (lambda: simnod_set.plan(True), "cases"), (lambda: simnod_set.plan(3, seed=-1), "seed"),
    (lambda: simnod_set.plan(3, side=80), "side"), (lambda: simnod_set.simnod_set(1, folder=__file__), "folder"),
    (lambda: simnod_set.generate(simnod_set.simnod_set(1, folder="nowhere"), jobs=0), "jobs"),
])  # fmt: skip
def test_refusals_name_the_argument(call, word):
    with pytest.raises(InputError, match=word):
        call()
