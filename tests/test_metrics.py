"""Metrics: literal loops, known cases, the golden values of the Brain-growth benchmark, bad input."""

from math import ceil, exp, log, pi, sqrt

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from medmatting.brain_growth import load
from medmatting.checks import InputError
from medmatting.metrics import PROTOCOLS, Score, conn, conn_original, grad, gradient_magnitude, mse, sad, score
from medmatting.volumes import Volume

RNG = np.random.default_rng(3)
NAMES = ("sad", "mse", "grad", "conn")


# --- literal forms, in plain loops ---------------------------------------------------------------------------------

def literal_sad(alpha, truth, region):
    return sum(abs(alpha[i] - truth[i]) for i in np.ndindex(alpha.shape) if region[i])


def literal_mse(alpha, truth, region):
    return sum((alpha[i] - truth[i]) ** 2 for i in np.ndindex(alpha.shape) if region[i]) / region.sum()


def literal_gradient(alpha, sigma=1.4):
    "Correlation with a 2D kernel of Gaussian times derivative, unit L2 norm, border replicated."
    half = ceil(sigma * sqrt(-2 * log(sqrt(2 * pi) * sigma * 0.01)))
    assert half == 4
    gauss = lambda x: exp(-x * x / (2 * sigma * sigma)) / (sigma * sqrt(2 * pi))
    span = range(-half, half + 1)
    kernel = np.array([[gauss(y) * -x * gauss(x) / sigma**2 for x in span] for y in span])
    kernel /= sqrt((kernel**2).sum())
    rows, columns = alpha.shape
    clamp = lambda value, top: min(max(value, 0), top - 1)
    result = np.zeros(alpha.shape)
    for i, j in np.ndindex(alpha.shape):
        gx = gy = 0.0
        for y in span:
            for x in span:
                value = alpha[clamp(i + y, rows), clamp(j + x, columns)]
                gx += value * kernel[y + half, x + half]
                gy += value * kernel[x + half, y + half]
        result[i, j] = sqrt(gx * gx + gy * gy)
    return result


def literal_grad(alpha, truth, region):
    return ((literal_gradient(alpha) - literal_gradient(truth)) ** 2)[region].sum()


def components(mask, faces_only=True):
    "Connected components by flood fill, in scan order."
    seen, found = set(), []
    steps = [s for s in np.ndindex((3,) * mask.ndim) if any(v != 1 for v in s)]
    steps = [tuple(v - 1 for v in s) for s in steps if not faces_only or sum(v != 1 for v in s) == 1]
    for start in np.ndindex(mask.shape):
        if not mask[start] or start in seen:
            continue
        seen.add(start)
        stack, component = [start], []
        while stack:
            here = stack.pop()
            component.append(here)
            for step in steps:
                there = tuple(a + b for a, b in zip(here, step))
                inside = all(0 <= t < n for t, n in zip(there, mask.shape))
                if inside and mask[there] and there not in seen:
                    seen.add(there)
                    stack.append(there)
        found.append(component)
    return found


def literal_conn(alpha, truth, region, faces_only=True):
    reach = np.full(alpha.shape, -1.0)
    for step in range(1, 11):
        found = components((alpha >= step * 0.1) & (truth >= step * 0.1), faces_only)
        largest = set(max(found, key=len)) if found else set()
        for i in np.ndindex(alpha.shape):
            if reach[i] == -1 and i not in largest:
                reach[i] = (step - 1) * 0.1
    reach[reach == -1] = 1
    total = 0.0
    for i in np.ndindex(alpha.shape):
        phi = [1 - (m[i] - reach[i]) * (m[i] - reach[i] >= 0.15) for m in (alpha, truth)]
        total += abs(phi[0] - phi[1]) * region[i]
    return total


def literal_conn_original(alpha, truth, region):
    opaque = components((alpha >= 254.5 / 255) & (truth >= 254.5 / 255))
    source = set(max(opaque, key=len)) if opaque else set()

    def phi(matte):
        connected = {}
        for step in range(1, 11):
            parts = components((matte >= step * 0.1) | np.isin(np.arange(matte.size).reshape(matte.shape),
                               [np.ravel_multi_index(i, matte.shape) for i in source]))
            connected[step] = [set(part) for part in parts if source and set(part) >= source]
            connected[step] = connected[step][0] if connected[step] else set()
        distance = {}
        for step, members in connected.items():
            d = np.array([min((sqrt((i[0] - m[0]) ** 2 + (i[1] - m[1]) ** 2) for m in members), default=1.0)
                          for i in np.ndindex(matte.shape)]).reshape(matte.shape)
            distance[step] = d / d.max() if d.max() > 0 else d
        result = np.ones(matte.shape)
        for i in np.ndindex(matte.shape):
            steps = [s for s in connected if i in connected[s]]
            reach = max(steps) * 0.1 if steps else 0.0
            between = [s for s in connected if matte[i] >= s * 0.1 and i not in connected[s]]
            weight = np.mean([distance[s][i] for s in between]) if between else 0.0
            gap = matte[i] - reach
            result[i] = 1 - weight * gap if gap >= 0.15 else 1
        return result

    return np.abs(phi(alpha) - phi(truth))[region].sum()


def blobs(shape):
    "A pair of mattes with several soft components, in steps of 1/255."
    grid = np.indices(shape).astype(float)
    truth = np.zeros(shape)
    for _ in range(3):
        centre = [RNG.uniform(0, n) for n in shape]
        r = sqrt_sum(grid, centre)
        truth = np.maximum(truth, np.clip(RNG.uniform(0.7, 1.6) - r / RNG.uniform(2, 4), 0, 1))
    alpha = np.clip(truth + 0.4 * RNG.standard_normal(shape) * (truth > 0.05) * (truth < 0.97), 0, 1)
    return np.floor(alpha * 255) / 255, np.floor(truth * 255) / 255


def sqrt_sum(grid, centre):
    return np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre)))


@pytest.mark.parametrize("shape", [(13, 17), (16, 9), (20, 20)])
def test_two_dimensional_measures_equal_their_loops(shape):
    for _ in range(3):
        alpha, truth = blobs(shape)
        region = RNG.random(shape) > 0.4
        for made, literal in ((sad, literal_sad), (mse, literal_mse), (grad, literal_grad), (conn, literal_conn),
                              (conn_original, literal_conn_original)):
            assert made(alpha, truth, region) == pytest.approx(literal(alpha, truth, region), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("connectivity, faces_only", [(None, True), (6, True), (26, False)])
def test_three_dimensional_connectivity_equals_its_loops(connectivity, faces_only):
    alpha, truth = blobs((6, 9, 8))
    region = RNG.random(truth.shape) > 0.3
    assert conn(alpha, truth, region, connectivity) == pytest.approx(literal_conn(alpha, truth, region, faces_only))


def test_connectivity_choice_matters_where_it_should():
    matte = np.zeros((4, 4, 4))
    matte[0, 0, :3] = 1
    matte[1, 1, 1:3] = 0.9
    truth = np.minimum(matte, np.where(np.indices(matte.shape)[0] == 1, 0.1, 1))
    assert conn(matte, truth, None, 26) == pytest.approx(2 * (0.9 - 0.1))
    assert conn(matte, truth, None, 6) == pytest.approx(2 * 0.9)


def test_the_whole_protocol_equals_its_loops():
    alpha, truth = blobs((15, 18))
    alpha = np.clip(alpha + RNG.uniform(0, 0.003, alpha.shape) * (alpha < 0.99), 0, 1)  # between two greys
    trimap = RNG.choice(np.array([0, 96, 128, 255], np.uint8), alpha.shape)
    made = score(alpha, truth, trimap, protocol="region-aware-2d")
    cut, region = np.floor(alpha * 255) / 255, trimap == 128
    stretch = lambda m: (m - m.min()) / (m.max() - m.min())
    assert made["sad"] == pytest.approx(literal_sad(cut, truth, region) / 1000)
    assert made["mse"] == pytest.approx(literal_mse(cut, truth, region))
    assert made["grad"] == pytest.approx(literal_grad(stretch(cut), stretch(truth), region) / 1000)
    assert made["conn"] == pytest.approx(literal_conn(cut, truth, region) / 1000)
    assert made["voxels"] == region.sum()


def test_alphamatting_is_the_original_definition_in_thousands():
    alpha, truth = blobs((15, 18))
    trimap = np.where(RNG.random(alpha.shape) > 0.5, 128, 0).astype(np.uint8)
    made, region = score(alpha, truth, trimap, protocol="alphamatting"), trimap == 128
    literals = (literal_sad, literal_mse, literal_grad, literal_conn_original)
    for name, literal, scale in zip(NAMES, literals, (1e-3, 1, 1e-3, 1e-3)):
        assert made[name] == pytest.approx(literal(alpha, truth, region) * scale)


# --- physical units ------------------------------------------------------------------------------------------------

def analytic_blob(spacing, extent=(24.0, 20.0, 20.0), sd=3.0):
    "A Gaussian bump sampled on a grid of that voxel size, and its gradient magnitude after smoothing by 2 mm."
    axes = [np.arange(0, length, size) - length / 2 for length, size in zip(extent, spacing)]
    r2 = sum(a**2 for a in np.meshgrid(*axes, indexing="ij"))
    wide = sd**2 + 2.0**2
    slope = (sd**2 / wide) ** 1.5 * np.sqrt(r2) / wide * np.exp(-r2 / (2 * wide))
    return np.exp(-r2 / (2 * sd**2)), slope


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 0.5, 0.5), (2.0, 0.7, 0.8)])
def test_gradient_is_per_mm_whatever_the_voxel(spacing):
    matte, slope = analytic_blob(spacing)
    made = gradient_magnitude(matte, 2.0, spacing)
    inner = tuple(slice(int(5 / s), -int(5 / s)) for s in spacing)
    assert np.abs(made - slope)[inner].max() < 0.02 * slope.max() + 0.002


def test_scaling_the_voxel_scales_the_gradient_error():
    alpha, truth = RNG.random((2, 6, 8, 7))
    one = score(alpha, truth, spacing=(2.0, 1.0, 1.0))
    two = score(alpha, truth, spacing=(4.0, 2.0, 2.0))
    assert two["grad"] == pytest.approx(one["grad"] / 4) and two["sigma_mm"] == 2 * one["sigma_mm"] == 2.8
    assert [two[k] for k in ("sad", "mse", "conn")] == [one[k] for k in ("sad", "mse", "conn")]
    assert score(alpha, truth, spacing=1)["grad"] != pytest.approx(score(alpha, truth, spacing=(3, 1, 1))["grad"])


def test_isotropic_spacing_differs_from_voxel_units_by_a_constant_only():
    alpha, truth = RNG.random((2, 12, 11))
    ratio = gradient_magnitude(alpha, 1.4, (1, 1)) / gradient_magnitude(alpha)
    assert np.ptp(ratio) < 1e-12 * ratio.mean()
    assert np.isclose(grad(alpha, truth, spacing=(1, 1)), ratio[0, 0] ** 2 * grad(alpha, truth))


@pytest.mark.parametrize("spacing, sigma", [((10, 0.15, 0.15), 0.21), ((1, 1, 1), 1e-9)])
def test_a_filter_far_narrower_than_a_voxel_is_a_central_difference(spacing, sigma):
    ramp = np.arange(7.0)[:, None, None] ** 2 * np.ones((1, 9, 9))
    inside = gradient_magnitude(ramp, sigma, spacing)[1:-1]
    assert np.allclose(inside, 2 * np.arange(1, 6)[:, None, None] / spacing[0])
    assert np.isfinite(score(ramp / 36, ramp[::-1] / 36, spacing=spacing, sigma_mm=sigma)["grad"])


def test_axis_order_follows_the_array():
    alpha, truth = RNG.random((2, 5, 7, 9))
    turn = lambda a: np.moveaxis(a, 0, 2)
    one = score(alpha, truth, spacing=(2.5, 0.8, 0.6))
    two = score(turn(alpha), turn(truth), spacing=(0.8, 0.6, 2.5))
    assert one["grad"] == pytest.approx(two["grad"]) and one["conn"] == pytest.approx(two["conn"])


# --- known cases and laws ------------------------------------------------------------------------------------------

def band(shape):
    trimap = np.full(shape, 128, np.uint8)
    trimap[0], trimap[-1] = 0, 255
    return trimap


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_perfect_matte_scores_zero(protocol):
    truth = blobs((8, 10, 9) if protocol == "volume-3d" else (12, 14))[1].astype(np.float32)
    made = score(truth, truth, band(truth.shape), protocol=protocol)
    assert all(made[name] == 0 for name in NAMES)


def test_a_constant_offset_has_no_gradient_error():
    truth = RNG.random((6, 7, 8)) * 0.5
    made = score(truth + 0.25, truth, band(truth.shape))
    assert made["sad"] == pytest.approx(0.25 * truth.size) and made["mse"] == pytest.approx(0.0625)
    assert made["grad"] == pytest.approx(0, abs=1e-12)
    assert made["sad_unknown"] == pytest.approx(0.25 * 4 * 56) and made["voxels_unknown"] == 4 * 56


def test_values_are_cut_not_rounded():
    truth, trimap = np.zeros((5, 6)), band((5, 6))
    made = lambda value: score(np.full((5, 6), value), truth, trimap, protocol="region-aware-2d")["sad"] * 1000 / 18
    assert made(0.999 / 255) == 0
    assert made(1.999 / 255) == pytest.approx(1 / 255)
    for grey in range(256):  # a matte that went through a file comes back as it was, in any float type
        assert made(np.float32(grey / 255)) == pytest.approx(grey / 255) == made(grey / 255)


def test_stretch_hides_amplitude_only_in_the_protocol_that_has_it():
    truth = blobs((16, 16))[1]
    half, trimap = np.floor(truth * 127) / 255, band((16, 16))
    assert score(half, truth, trimap, "region-aware-2d")["grad"] < 0.02 * score(half, truth, trimap, "alphamatting")["grad"]


def test_no_opaque_pixel_is_still_a_score():
    alpha, truth = RNG.random((2, 8, 9)) * 0.6
    made = score(alpha, truth, band((8, 9)), protocol="alphamatting")
    assert made["conn"] == pytest.approx(literal_conn_original(alpha, truth, band((8, 9)) == 128) / 1000) and made["conn"] > 0


@given(arrays(float, (6, 7), elements=st.floats(0, 1)), arrays(float, (6, 7), elements=st.floats(0, 1)))
def test_errors_are_symmetric_and_not_negative(alpha, truth):
    for measure in (sad, mse, grad, conn, conn_original):
        assert measure(alpha, truth) == pytest.approx(measure(truth, alpha), rel=1e-9, abs=1e-12) and measure(alpha, truth) >= 0


def test_image_types_mean_the_same():
    greys = RNG.integers(2, 256, (9, 9)).astype(np.uint8)
    truth, trimap = RNG.random((9, 9)), band((9, 9))
    expected = score(greys / 255, truth, trimap, protocol="alphamatting")
    for form in (greys, greys.astype(np.uint16) * 257, (greys / 255).astype(">f8"), Volume(greys)):
        assert score(form, truth, trimap, protocol="alphamatting") == expected
    mask = greys > 99
    assert score(mask, truth, trimap, protocol="alphamatting") == score(mask.astype(float), truth, trimap, protocol="alphamatting")


def test_regions():
    alpha, truth = RNG.random((2, 6, 8))
    trimap = band((6, 8))
    for region, count in ((None, 32), ("unknown", 32), ("whole", 48), (trimap == 0, 8)):
        assert score(alpha, truth, trimap, protocol="alphamatting", region=region)["voxels"] == count
    assert score(alpha, truth, trimap / 255, protocol="region-aware-2d")["voxels"] == 32
    assert "sad_unknown" not in score(*RNG.random((2, 4, 5, 6)))


def test_a_score_is_a_table_row_and_shows_itself():
    alpha, truth = RNG.random((2, 4, 5, 6))
    row = score(Volume(alpha, (2.0, 1.0, 1.0)), Volume(truth, (2.0, 1.0, 1.0)), band((4, 5, 6)), connectivity=26)
    assert isinstance(row, Score) and row == score(alpha, truth, band((4, 5, 6)), spacing=(2, 1, 1), connectivity=26)
    assert pd.DataFrame([row, row])["sad"].sum() == 2 * row["sad"]
    text = row._repr_markdown_()
    assert "volume-3d" in text and "26 neighbours" in text and "sigma 1.4 mm" in text and "| unknown | 60 |" in text


# --- golden values: the complete Brain-growth benchmark ------------------------------------------------------------

@pytest.fixture(scope="module")
def cases(brain_growth_dir):
    return load(brain_growth_dir)


TRIVIAL = {
    "one": lambda case: (case.trimap_raw > 0).astype(float),
    "zero": lambda case: np.zeros(case.alpha.shape),
    "half": lambda case: np.where(case.region, 0.5, case.trimap_raw > 128),
    "raters": lambda case: case.masks.mean(axis=0),
}


def column(cases, prediction, region):
    "Mean over the cases, as the printed tables have it."
    rows = [score(TRIVIAL[prediction](c), c.alpha, c.trimap_raw, protocol="region-aware-2d", region=region) for c in cases]
    return pd.DataFrame(rows)[["sad", "mse", "grad"]].mean()


@pytest.mark.parametrize("prediction, region, values", [
    ("one", "unknown", ("1.5419", "0.4410", "2.6960")),  # the row the 2D paper prints for closed-form matting
    ("zero", "unknown", ("1.1151", "0.2744", "4.416")),
    ("half", "unknown", ("0.7394", "0.1074", None)),
    ("raters", "unknown", ("0.5445", "0.0796", "1.291")),
    ("zero", "whole", ("1.9333", "0.0867", "5.27")),
    ("raters", "whole", ("0.7559", "0.0177", "1.547")),
])
def test_golden_values(cases, prediction, region, values):
    assert len(cases) == 39
    for obtained, printed in zip(column(cases, prediction, region), values):
        if printed is not None:
            assert f"{obtained:.{len(printed.split('.')[1])}f}" == printed


def test_rounding_instead_of_cutting_misses_the_printed_digits(cases):
    rounded = [score(np.round(TRIVIAL["raters"](c) * 255) / 255, c.alpha_raw, region=c.region, protocol="region-aware-2d")
               for c in cases]
    assert f"{pd.DataFrame(rounded)['sad'].mean():.4f}" == "0.5451"


def test_connectivity_on_a_real_case_equals_its_loops(cases):
    case = cases[0]
    made = score(TRIVIAL["raters"](case), case.alpha, case.trimap_raw, protocol="region-aware-2d")["conn"]
    cut = np.floor(TRIVIAL["raters"](case) * 255) / 255
    assert made == pytest.approx(literal_conn(cut, case.alpha_raw / 255, case.region) / 1000)


# --- bad input -----------------------------------------------------------------------------------------------------

FLAT, BAND = np.full((6, 8), 0.5), band((6, 8))


@pytest.mark.parametrize("arguments, more, words", [
    ((FLAT[:5], FLAT, BAND), {}, "alpha: got shape"),
    ((FLAT, FLAT, BAND[:5]), {}, "trimap: got shape"),
    ((FLAT * 255, FLAT, BAND), {}, r"48 values outside \[0, 1\], by up to 126"),
    ((FLAT, FLAT - 0.6, BAND), {}, "truth: got 48 values outside"),
    ((FLAT + 0.50001, FLAT, BAND), {}, "by up to 1e-05"),
    ((FLAT * np.nan, FLAT, BAND), {}, "NaN"),
    ((FLAT, FLAT), {}, "trimap: got none"),
    ((FLAT, FLAT, BAND * 0), {}, "region: got no voxel"),
    ((FLAT, FLAT, BAND // 100), {}, "labels"),
    ((FLAT, FLAT, BAND == 128), {}, "bool"),
    ((FLAT, FLAT, BAND.astype(float)), {}, "numpy.uint8"),
    ((FLAT.astype(int), FLAT, BAND), {}, "int64"),
    (((BAND > 0).astype(np.uint8), FLAT, BAND), {}, r"astype\(bool\)"),
    ((FLAT[None], FLAT[None], BAND[None]), {}, "3 axes"),
    ((FLAT, FLAT, BAND), dict(protocol="volume-3d"), "2 axes"),
    ((FLAT, FLAT, BAND), dict(protocol="mine"), "protocol"),
    ((FLAT, FLAT, BAND), dict(region="band"), "region"),
    ((FLAT, FLAT, BAND), dict(region=BAND), "region"),
    ((FLAT, FLAT, BAND), dict(connectivity=8), "connectivity"),
    ((FLAT, FLAT, BAND), dict(sigma_mm=1.0), "sigma_mm"),
    ((FLAT, FLAT, BAND), dict(spacing=(1, 0)), "spacing"),
    ((Volume(FLAT, 1.0), Volume(FLAT, 2.0), BAND), {}, "voxel sizes"),
    ((Volume(np.ones((4, 4, 3)), channels=True), FLAT, BAND), {}, "one channel"),
])
def test_bad_input_is_refused(arguments, more, words):
    with pytest.raises(InputError, match=words):
        score(*arguments, **{"protocol": "region-aware-2d", **more})


@pytest.mark.parametrize("more", [dict(connectivity=4), dict(sigma_mm=0), dict(sigma_mm=np.nan), dict(spacing=(1, 1)),
                                  dict(connectivity=[4]), dict(sigma_mm="x"), dict(sigma_mm=np.inf), dict(protocol=["x"])])
def test_bad_settings_of_volumes_are_refused(more):
    with pytest.raises(InputError, match=next(iter(more))):
        score(*RNG.random((2, 4, 5, 6)), **more)


@pytest.mark.parametrize("other", [dict(origin=(0, 0, 9)), dict(direction=np.diag([1, 1, -1]))])
def test_volumes_on_different_grids_are_refused(other):
    values = np.where(np.arange(4) == 1, 255, np.where(np.arange(4) == 2, 0, 128)) * np.ones((3, 4, 1))
    here, there = Volume(values / 255), Volume(values / 255, **other)
    assert score(here, here, here)["sad"] == 0
    for argument, volumes in {"alpha": (there, here), "trimap": (here, here, there)}.items():
        with pytest.raises(InputError, match=f"{argument}: .*mm away"):
            score(*volumes)
    with pytest.raises(InputError, match="trimap: .*mm away"):
        score(here, here.array, there)


@pytest.mark.parametrize("more", [dict(sigma=0), dict(sigma="x"), dict(sigma=np.inf), dict(spacing=(1, -1)), dict(spacing=(1,))])
def test_bad_settings_of_the_gradient_are_refused(more):
    with pytest.raises(InputError, match=next(iter(more))):
        grad(FLAT, FLAT, **more)


@pytest.mark.parametrize("dtype, top", [(">u2", 65535), ("<u2", 65535), (">u1", 255)])
def test_byte_order_does_not_matter(dtype, top):
    assert sad(np.full((2, 3), top, dtype), np.ones((2, 3))) == 0


def test_other_greys_in_a_trimap_are_for_one_protocol_only():
    greys = BAND.copy()
    greys[1] = 96
    assert score(FLAT, FLAT, greys, protocol="region-aware-2d")["voxels"] == 24
    with pytest.raises(InputError, match="8 voxels of 1 other values"):
        score(FLAT, FLAT, greys, protocol="alphamatting")


def test_rounding_of_float32_is_let_through():
    assert sad(FLAT.astype(np.float32) * 2 + np.float32(2e-7), np.ones_like(FLAT)) == 0


@given(seed=st.integers(0, 2**32 - 1), spacing=st.tuples(*[st.floats(0.3, 3)] * 3))
def test_score_of_a_small_nodule_equals_the_measures_of_the_whole_volume(seed, spacing):
    rng = np.random.default_rng(seed)
    before, after = rng.integers(0, 9, (2, 3))
    alpha, truth = (np.pad(rng.random((4, 5, 6)) * (rng.random((4, 5, 6)) > 0.6), list(zip(before, after))) for _ in range(2))
    found = score(alpha, truth, spacing=spacing)
    assert found["grad"] == grad(alpha, truth, sigma=found["sigma_mm"], spacing=spacing)
    assert found["conn"] == conn(alpha, truth) and found["sad"] == sad(alpha, truth)
