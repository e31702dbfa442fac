"""The data sets of Table 1: published files, stand-ins, regions, folds, refusals."""

import numpy as np
import pytest

import miniature
from medmatting import DataError, InputError
from medmatting.brain_growth import UnsafePickleError
from medmatting.folds import brain_growth_folds
from medmatting.matting_sets import SIDE, find_published, isic_like, lidc_like, matting_set, table1_sets, to_square


@pytest.fixture(scope="module")
def simulated():
    return lidc_like(per_texture=2, slices=2)


def check(data):
    "What holds for every set."
    assert data.samples.keys() == data.regions.keys()
    judged = [case for fold in data.folds for case in fold.test]
    assert sorted(judged) == sorted(data.samples)
    sizes = {tuple(sample["image"].shape) for sample in data.samples.values()}
    assert len(sizes) == 1
    for case, sample in data.samples.items():
        assert sample["name"] == case and 0 <= sample["alpha"].min() <= sample["alpha"].max() <= 1
        assert data.regions[case].dtype == bool and data.regions[case].shape == sample["alpha"].shape[1:]
        assert sample["masks"].shape[1:] == sample["alpha"].shape[1:] and set(sample["masks"].unique().tolist()) <= {0, 1}


def test_published_slices_are_read_as_they_are(tmp_path):
    cases = miniature.lidc_cases()
    data = matting_set("lidc", miniature.write_set(tmp_path / "lidc", "lidc", cases).parent)
    check(data)
    for name, fields in cases.items():
        sample = data.samples[name]
        assert np.array_equal((sample["image"][0] * 255).round(), fields["image"]) and np.array_equal(sample["masks"], fields["masks"])
        np.testing.assert_allclose(sample["alpha"][0], fields["alpha"] / 255, atol=1e-7)
        assert np.array_equal(data.regions[name], miniature.trimap(fields) == 128)
    for fold in data.folds:
        assert {case.split("_")[0] for case in fold.train}.isdisjoint(case.split("_")[0] for case in fold.test)


def test_published_photographs_come_to_one_size(tmp_path):
    cases = {f"ISIC_{i:07d}": miniature.case(f"ISIC_{i:07d}", (18 + i, 30), colour=True) for i in range(8)}
    data = matting_set("isic", miniature.write_set(tmp_path, "isic", cases))
    check(data)
    assert {tuple(sample["image"].shape) for sample in data.samples.values()} == {(3, SIDE, SIDE)}
    share = np.mean([data.regions[name].mean() * 30 * 30 for name in cases])
    assert share == pytest.approx(np.mean([(miniature.trimap(f) == 128).sum() for f in cases.values()]), rel=0.1)


def test_a_square_keeps_the_middle_in_the_middle_and_invents_no_levels():
    picture = np.full((20, 40), 255, np.uint8)
    picture[10, 20] = 128
    small = to_square(picture, smooth=False, side=40)
    assert set(np.unique(small)) == {0, 128, 255} and (small[:10] == 0).all() and (small[30:] == 0).all() and (small[11:19] == 255).all()
    assert to_square(np.zeros((7, 5, 3), np.uint8), side=16).shape == (16, 16, 3)


def test_a_hostile_pickle_is_not_run(tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return print, ("run",)

    folder = miniature.write_set(tmp_path, "lidc", {"a": Hostile()}, {"a": np.zeros((4, 4), np.uint8)})
    with pytest.raises(UnsafePickleError, match="^lidc: the pickle asks for builtins.print"):
        matting_set("lidc", folder)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("spoil, message", [
    (lambda cases, maps: maps.pop("0_slice0"), "same names"),
    (lambda cases, maps: maps.update({"0_slice0": np.zeros((8, 8), np.uint8)}), "0_slice0 differ in size"),
    (lambda cases, maps: cases["0_slice0"].pop("alpha"), "0_slice0 does not hold"),
    (lambda cases, maps: cases["0_slice0"].update(masks=[]), "0_slice0 does not hold"),
])
def test_damaged_files_are_refused_by_case(tmp_path, spoil, message):
    cases = miniature.lidc_cases()
    maps = {name: miniature.trimap(fields) for name, fields in cases.items()}
    spoil(cases, maps)
    with pytest.raises(DataError, match=message):
        matting_set("lidc", miniature.write_set(tmp_path, "lidc", cases, maps))


def test_what_is_not_here_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="lidc_attributes.zip and trimap_LIDC.zip not found .* lidc-like"):
        matting_set("lidc", tmp_path)
    with pytest.raises(DataError, match="medmatting data fetch brain_growth"):
        matting_set("brain-growth", tmp_path)
    with pytest.raises(InputError, match="data: got 'LIDC', but accepted is brain-growth"):
        matting_set("LIDC")
    with pytest.raises(InputError, match="fold: got 4, but accepted is a whole number from 0 to 3 for lidc"):
        matting_set("lidc", miniature.write_set(tmp_path, "lidc", miniature.lidc_cases())).fold(4)


def test_stand_ins_give_way_to_published_files(tmp_path):
    assert table1_sets(tmp_path) == ("lidc-like", "isic-like", "brain-growth") and find_published("lidc", tmp_path) is None
    miniature.write_set(tmp_path, "isic", {"a": miniature.case("a")})
    assert table1_sets(tmp_path) == ("lidc-like", "isic", "brain-growth")


def test_simulated_slices(simulated):
    check(simulated)
    assert simulated.says.startswith("simulated") and "not the LIDC set" in simulated.says
    for name, sample in simulated.samples.items():
        masks, region = sample["masks"].numpy() > 0, simulated.regions[name]
        assert (region | ~(masks.any(0) & ~masks.all(0))).all()  # every pixel on which readers differ is scored
        assert 0.01 < region.mean() < 0.5 and sample["alpha"].max() > 0.05
        assert 0 < sample["image"].min() < sample["image"].max() <= 1


def test_stand_in_photographs_follow_the_mask_outside_the_band():
    data = isic_like()
    check(data)
    assert "not the ISIC set" in data.says and len(data.folds) == 3
    for name, sample in data.samples.items():
        known = ~data.regions[name]
        assert np.array_equal(sample["alpha"][0].numpy()[known], sample["masks"][0].numpy()[known])


def test_brain_growth_is_the_published_benchmark(brain_growth_dir):
    data = matting_set("brain-growth", brain_growth_dir)
    check(data)
    assert data.folds == brain_growth_folds()
    assert np.mean([region.sum() for region in data.regions.values()]) == pytest.approx(2656.95, abs=0.01)
