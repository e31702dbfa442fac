"""Inputs at the edge of what has an answer, through every method: a correct matte or a named refusal, never NaN."""

import numpy as np
import pytest

import medmatting as mm
import medmatting.matting
from medmatting.checks import InputError
from medmatting.linear import Stalled, pcg_within

SHAPE = (10, 14, 16)
RANDOM = np.random.default_rng(0)
DISTANCE = np.sqrt(sum((g - n / 2) ** 2 for g, n in zip(np.indices(SHAPE), SHAPE)))
BALL = (np.clip((5 - DISTANCE) / 4, 0, 1) * 0.6 + 0.2 + RANDOM.normal(0, 0.01, SHAPE)).clip(0, 1)
SHELL = np.where(DISTANCE < 2, 255, np.where(DISTANCE > 5, 0, 128)).astype(np.uint8)


def labels(fill, **places):
    "A trimap of one value but for some voxels."
    trimap = np.full(SHAPE, fill, np.uint8)
    for name, voxels in places.items():
        for voxel in voxels:
            trimap[voxel] = {"known": 255, "empty": 0, "open": 128}[name]
    return trimap


CORNERS = [(0, 0, 0), (-1, -1, -1), (0, -1, 0)]
SPIKES = np.where(RANDOM.random(SHAPE) < 0.02, 1.0, BALL * 0 + 0.2)
CASES = {
    "isolated unknown voxels": (BALL, labels(0, known=[(5, 7, 8)], open=[(2, 2, 2), (7, 11, 3), (8, 3, 12)]), {}),
    "unknown corners": (BALL, labels(0, known=[(5, 7, 8)], open=CORNERS), {}),
    "unknown to every border": (BALL, np.where(SHELL == 0, 128, SHELL) * (DISTANCE < 9).astype(np.uint8), {}),
    "a region without foreground": (BALL, labels(0, known=[(5, 7, 8)], open=[(1, 1, x) for x in range(1, 5)]), {}),
    "constant": (BALL * 0 + 0.5, SHELL, {}),
    "zero": (BALL * 0, SHELL, {}),
    "constant in half of the windows": (np.where(np.arange(14)[:, None] < 7, 0.3, BALL), SHELL, {}),
    "two values": ((BALL > 0.5) * 1.0, SHELL, {}),
    "single spikes": (SPIKES, SHELL, {}),
    "huge": (BALL * 1e300, SHELL, dict(intensity_range=(0, 1e300))),
    "tiny": (BALL * 1e-30, SHELL, dict(intensity_range=(0, 1e-30))),
    "far from zero": (BALL + 1e8, SHELL, dict(intensity_range=(1e8, 1e8 + 1))),
    "contrast of one millionth": (BALL * 1e-6 + 0.5, SHELL, {}),
    "slices far apart": (BALL, SHELL, dict(spacing=(100, 1, 1))),
    "columns far apart": (BALL, SHELL, dict(spacing=(1, 1, 100))),
    "all unknown but two": (BALL, labels(128, known=[(-1, -1, -1)], empty=[(0, 0, 0)]), {}),
    "all unknown but two, constant": (BALL * 0 + 0.5, labels(128, known=[(5, 7, 8)], empty=[(2, 2, 2)]), {}),
    "three slices": (BALL[:3], np.where(SHELL[:3] == 255, 255, SHELL[4:7]), {}),
    "one slice": (BALL[5:6], SHELL[5:6], {}),
    "one column": (BALL[:, :, 8:9], SHELL[:, :, 8:9], {}),
    "two slices": (BALL[4:6], SHELL[4:6], {}),
}


@pytest.mark.parametrize("method", ["cf", "lb", "knn", "if", "bayesian"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error")
def test_a_correct_matte_or_a_named_refusal(method, name):
    image, trimap, options = CASES[name]
    if method == "bayesian":  # images only
        options = {key: value[1:] if key == "spacing" else value for key, value in options.items()}
        image, trimap = image[len(image) // 2], trimap[len(trimap) // 2]
    try:
        alpha, info = mm.matte(image, trimap, method, return_info=True, **options)
    except InputError as error:
        assert "but accepted is" in str(error)
        assert method == "bayesian" and "trimap" in str(error) or name == "two slices" and method != "knn"
        return
    assert np.isfinite(alpha).all() and alpha.min() >= 0 and alpha.max() <= 1
    assert (alpha[trimap == 255] == 1).all() and (alpha[trimap == 0] == 0).all()
    if method in ("cf", "lb"):
        exact = mm.matte(image, trimap, method, solver="direct", **options)
        assert abs(alpha - exact).max() < (2e-3 if (method, name) == ("lb", "single spikes") else 1e-4)
        assert info.residual <= 1e-6


@pytest.mark.parametrize("method", ["cf+", "lb+", "knn+", "if+"])
@pytest.mark.parametrize("name", [name for name in CASES if "intensity_range" not in CASES[name][2]])
@pytest.mark.filterwarnings("error")
def test_the_same_in_hounsfield_units_with_a_calibrated_foreground(method, name):
    image, trimap, options = CASES[name]
    hu = -1000 + 1400 * image
    try:
        alpha = mm.matte(hu, trimap, method, **options)
    except InputError as error:
        assert name == "two slices" and method != "knn+" and "but accepted is" in str(error)
        return
    assert np.isfinite(alpha).all() and alpha.min() >= 0 and alpha.max() <= 1
    assert (alpha[trimap == 255] == mm.calibrate(hu[trimap == 255]).astype(np.float32)).all() and (alpha[trimap == 0] == 0).all()
    if method in ("cf+", "lb+"):
        exact = mm.matte(hu, trimap, method, solver="direct", **options)
        assert abs(alpha - exact).max() < (2e-3 if (method, name) == ("lb+", "single spikes") else 1e-4)


@pytest.mark.parametrize("neighbours", [(100, 20), (3, 2)])
def test_more_neighbours_than_known_voxels(neighbours):
    alpha = mm.matte(BALL, labels(128, known=[(5, 7, 8)], empty=[(0, 0, 0)]), "knn", neighbours=neighbours)
    assert np.isfinite(alpha).all() and alpha[5, 7, 8] == 1 and alpha[0, 0, 0] == 0


def test_regions_without_foreground_are_background():
    image, trimap, _ = CASES["a region without foreground"]
    assert mm.matte(image, trimap)[trimap == 128].max() == 0


def test_voxels_that_rounding_would_detach_are_solved_in_double_precision(monkeypatch):
    tried = []
    monkeypatch.setattr(medmatting.matting, "pcg_within", lambda system, *rest: tried.append(system.number) or pcg_within(system, *rest))
    image, trimap, _ = CASES["single spikes"]
    for options in ({}, dict(precision="single")):
        alpha, info = mm.matte(image, trimap, return_info=True, **options)
        assert info.precision == "double" and info.residual <= 1e-6
    assert tried == [np.float64] * 2  # single precision was not even started
    assert mm.matte(BALL, SHELL, return_info=True)[1].precision == "single"


@pytest.mark.parametrize("precision", [None, "double"])
def test_weak_voxels_are_solved_to_a_smaller_residual(precision):
    "Diagonal entries of spikes in flat tissue are a millionth of the others: the usual residual leaves 0.12 here."
    distance = np.sqrt(((np.indices((14, 14, 14)) - 7) ** 2).sum(0))
    trimap = np.where(distance < 2, 255, np.where(distance > 5, 0, 128)).astype(np.uint8)
    image = np.where(np.random.default_rng(1).random(trimap.shape) < 0.02, 1.0, 0.2)
    assert abs(mm.matte(image, trimap, precision=precision) - mm.matte(image, trimap, solver="direct")).max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("precision", [None, "double"])
def test_spikes_in_weak_noise_keep_the_promise(seed, precision):
    "Noise of 1.4 HU, spikes that touch."
    random = np.random.default_rng(seed)
    image = np.where(random.random(SHAPE) < 0.02, 1.0, 0.2 + random.normal(0, 1e-3, SHAPE)).clip(0, 1)
    assert abs(mm.matte(image, SHELL, precision=precision) - mm.matte(image, SHELL, solver="direct")).max() < 1e-4


def test_where_single_precision_stalls_double_takes_over(monkeypatch):
    tried = []

    def stall(system, *rest):
        tried.append(system.number)
        if system.number is np.float32:
            raise Stalled("as if rounding had stopped it")
        return pcg_within(system, *rest)

    expected = mm.matte(BALL, SHELL, precision="double")
    monkeypatch.setattr(medmatting.matting, "pcg_within", stall)
    alpha, info = mm.matte(BALL, SHELL, return_info=True)
    assert tried == [np.float32, np.float64] and info.precision == "double"
    assert np.array_equal(alpha, expected)


def test_one_difficult_region_shows_in_the_precision_of_a_study():
    image, trimap = np.concatenate([BALL, BALL * 0 + 0.2, SPIKES]), np.concatenate([SHELL, SHELL * 0, SHELL])
    assert mm.matte(image, trimap, return_info=True)[1].precision == "double"


@pytest.mark.parametrize("method", ["knn", "if"])
def test_a_device_is_refused_by_methods_that_have_none(method):
    with pytest.raises(InputError, match=f"device: got 'cuda'.*for '{method}'"):
        mm.matte(BALL, SHELL, method, device="cuda")
