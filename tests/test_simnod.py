"""Simulated nodules: the mixture is exact, the outlines are the real ones, and the numbers look like those of a scan."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medmatting import lidc, simnod
from medmatting.checks import InputError
from medmatting.volumes import Volume


@pytest.fixture(scope="module")
def cases() -> list:
    return [simnod.simulate(index) for index in simnod.choose_shapes(2)]


def test_image_is_the_mixture_with_the_true_alpha(cases):
    for case in cases:
        mixed = case.alpha.astype(float) * case.foreground + (1.0 - case.alpha) * case.background
        assert np.abs(case.ct.array - case.noise - mixed).max() < 1e-3
        assert case.alpha.dtype == np.float32 and 0 <= case.alpha.min() and case.alpha.max() <= 1
        assert case.ct.unit == "HU" and case.ct.meta["simulated"]


def test_noise_vanishes_where_the_background_is_untouched(cases):
    for case in cases:
        far, near = case.alpha < 1e-4, case.alpha > 0.9
        assert np.abs(case.noise[far]).max() < 2  # 13 HU times sqrt(2e-4)
        assert not near.any() or 8 < case.noise[near].std() < 18


def test_the_masks_are_those_of_the_readers(cases):
    for case in cases:
        real = lidc.shape(case.index)
        voxel = np.prod(real.spacing) / 0.5**3
        assert case.masks.sum((1, 2, 3)) == pytest.approx(real.masks.sum((1, 2, 3)) * voxel, rel=0.1)
        border = np.ones(case.alpha.shape, bool)
        border[2:-2, 2:-2, 2:-2] = False
        assert not case.masks[:, border].any() and case.alpha[border].max() < 0.05


def test_density_follows_texture(cases):
    core = {name: np.median([np.median(c.ct.array[c.masks.all(0)]) for c in cases if c.texture == name]) for name in simnod.TEXTURES}
    assert core["solid"] > core["part-solid"] > core["ground glass"]
    assert -760 < core["ground glass"] < -600 and core["solid"] > -250
    assert max(c.alpha.max() for c in cases if c.texture == "ground glass") <= simnod.GROUND_GLASS + 1e-6


def test_background_is_real_lung_without_a_nodule(cases):
    for case in cases:
        ct = lidc.nodule(case.lung).ct
        assert -920 < np.median(case.background) < -800
        assert case.background.min() >= ct.array.min() and case.background.max() <= ct.array.max()
        outlined = ct.with_array(lidc.nodule(case.lung).masks.any(0).astype(np.uint8), unit="")
        assert not simnod.resample_like(outlined, case.ct, "nearest").array.any()


def test_a_pleural_nodule_meets_the_wall_and_leaves_it_background():
    index = next(iter(simnod.choose_shapes(1)))
    case, inside = simnod.simulate(index, pleural=True), simnod.simulate(index)
    assert case.pleural and not inside.pleural
    wall = ndimage.binary_erosion(ndimage.binary_opening(case.background > -300, iterations=2), iterations=3)
    near = ndimage.binary_dilation(case.alpha > 0.5, iterations=6)
    assert (near & (case.background > -300)).sum() > 50 and case.alpha[wall].max(initial=0) < 0.1
    assert not (case.masks.any(0) & wall).any() and case.masks.sum() < inside.masks.sum() and case.masks.all(0).any()
    mixed = case.alpha.astype(float) * case.foreground + (1.0 - case.alpha) * case.background
    assert np.abs(case.ct.array - case.noise - mixed).max() < 1e-3


def test_seed_and_index_decide_everything():
    index = next(iter(simnod.choose_shapes(1)))
    first, second, other = (simnod.simulate(index, seed=seed, spacing_mm=1.0) for seed in (3, 3, 4))
    assert np.array_equal(first.ct.array, second.ct.array) and not np.array_equal(first.ct.array, other.ct.array)


def test_a_smaller_draw_is_part_of_a_larger_one():
    assert set(simnod.choose_shapes(3)) < set(simnod.choose_shapes(20))
    for index, texture in simnod.choose_shapes(20).items():
        rating = np.mean([int(v) for v in lidc.shapes().loc[index, "texture"].split()])
        low, high = simnod.TEXTURES[texture]
        assert low <= rating <= high and simnod.nearest_texture(rating) == texture


@settings(max_examples=10, deadline=None)
@given(radius=st.floats(3, 6))
def test_consensus_of_equal_spheres_is_their_distance(radius):
    grid = np.indices((25, 25, 25)) - 12
    ball = Volume((grid**2).sum(0) < radius**2, (1.0, 1.0, 1.0))
    distance = simnod.consensus([ball] * 4, 1.0).array
    assert np.abs(distance - (radius - np.sqrt((grid**2).sum(0)))).max() < 1.3


def test_alpha_of_a_flat_edge_is_the_blurred_logistic():
    depth = np.broadcast_to(np.arange(-20, 20) * 0.25, (5, 5, 40)).astype(np.float32)
    alpha = simnod.true_alpha(Volume(depth, (0.25,) * 3), "solid", 5, 2.5)
    expected = ndimage.gaussian_filter1d(1 / (1 + np.exp(-depth[2, 2].astype(float) / 0.25)), 1.0 / 2.354820045 / 0.25)
    assert alpha[2, 2] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("call, word", [
    (lambda: simnod.choose_shapes(0), "per_texture"), (lambda: simnod.choose_shapes(21), "per_texture"),
    (lambda: simnod.simulate(0, texture="liquid"), "texture"), (lambda: simnod.simulate(-1), "index"),
    (lambda: simnod.simulate(0, spacing_mm=0), "spacing"),
])
def test_refusals_name_the_argument(call, word):
    with pytest.raises(InputError, match=word):
        call()


def test_appearance_of_a_ball_is_what_was_put_in():
    grid = np.indices((40, 40, 40)) - 19.5
    depth = 7 - np.sqrt((grid**2).sum(0)) * 0.5
    rng = np.random.default_rng(0)
    ct = Volume((np.where(depth > 0, 50, -850) + 10 * rng.standard_normal(depth.shape)).astype(np.float32), (0.5, 0.5, 0.5), unit="HU")
    found = simnod.appearance(ct, np.stack([depth > 0] * 2))
    assert found["dice"] == found["iou"] == 1 and found["core_hu"] == pytest.approx(50, abs=2)
    assert found["core_noise_hu"] == pytest.approx(10, rel=0.1) and found["lung_noise_hu"] == pytest.approx(10, rel=0.1)
    assert found["profile +2 to +3 mm"] == pytest.approx(50, abs=2) and found["profile -3 to -2 mm"] == pytest.approx(-850, abs=2)


def test_a_real_nodule_is_cut_around_its_outlines():
    ct, masks = simnod.real_nodule("LIDC-IDRI-0003_nodule4")
    whole = lidc.nodule("LIDC-IDRI-0003_nodule4")
    assert masks.shape == (4, *ct.shape) and ct.spacing == (0.5,) * 3 and ct.unit == "HU"
    assert masks.sum((1, 2, 3)) / 8 == pytest.approx(whole.masks.sum((1, 2, 3)) * np.prod(whole.spacing), rel=0.1)
