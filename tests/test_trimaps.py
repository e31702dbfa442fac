"""Trimaps: the strict reader, bands in mm against brute force, laws of the band, bad input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from medmatting.checks import InputError
from medmatting.files import write
from medmatting.trimaps import check_trimap, clean_trimap, trimap_from_file, trimap_from_mask, trimap_from_raters
from medmatting.volumes import Volume

GOOD = np.full((3, 4, 5), 128, np.uint8)
GOOD[..., 0], GOOD[..., -1] = 0, 255
HALF_BAND = np.where(GOOD == 128, 0.25, GOOD / 255)


# --- the strict reader ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_in_unit_range_are_read(dtype):
    assert np.array_equal(check_trimap(HALF_BAND.astype(dtype)), GOOD)


def test_uint8_is_returned_as_it_is_and_other_layouts_are_read():
    assert check_trimap(GOOD, (3, 4, 5)) is GOOD
    for view in (np.asfortranarray(GOOD), GOOD[:, ::-1], np.moveaxis(GOOD, 0, 1)):
        assert np.array_equal(check_trimap(view), view)
    assert np.array_equal(check_trimap(Volume(GOOD)), GOOD)


def test_floats_just_beside_the_ends_are_unknown():
    edge = HALF_BAND.copy()
    edge[0, 0, 0], edge[0, 0, -1] = np.nextafter(0, 1), np.nextafter(1, 0)
    assert (check_trimap(edge) == 128).sum() == (GOOD == 128).sum() + 2


@pytest.mark.parametrize("bad, words", [
    (GOOD == 255, "bool"),
    (GOOD.astype(float), "numpy.uint8"),
    (GOOD.astype(np.float32) / 2, "0 to 127.5"),
    (HALF_BAND - 0.5, "-0.5"),
    (HALF_BAND * np.nan, "NaN"),
    (GOOD.astype(np.int64), "numpy.uint8"),
    (GOOD // 127, r"labels \[0, 1, 2\]"),
    ((GOOD == 255).astype(np.uint8), r"labels \[0, 1\]"),
    (np.where(GOOD == 128, 64 + np.arange(5) * 16, GOOD).astype(np.uint8), "36 voxels of 3 other values"),
    (GOOD.astype(complex), "complex"),
    (GOOD[0, 0], r"shape \(5,\)"),
    (GOOD[:0], "shape"),
    (np.minimum(GOOD, 128), "no foreground"),
    (np.maximum(GOOD, 128), "no background"),
    (np.where(GOOD == 128, 0, GOOD).astype(np.uint8), "no unknown"),
    (np.round(HALF_BAND), "no unknown"),
])
def test_everything_else_is_refused_by_name(bad, words):
    with pytest.raises(InputError, match=words) as error:
        check_trimap(bad)
    assert str(error.value).startswith("trimap: got ")


def test_wrong_shape_and_colour_are_refused():
    with pytest.raises(InputError, match="shape of the image"):
        check_trimap(GOOD, (4, 3, 5))
    with pytest.raises(InputError, match="channels"):
        check_trimap(Volume(GOOD, channels=True))


def test_an_incomplete_trimap_can_be_read_when_asked():
    assert check_trimap(np.minimum(GOOD, 128), complete=False).max() == 128
    with pytest.raises(InputError, match="labels"):
        check_trimap(GOOD // 127, complete=False)


# --- bands in mm ---------------------------------------------------------------------------------------------------

def brute_force(masks, dilate_mm, erode_mm, spacing):
    "The definition: distances between all pairs of voxel centres."
    core, union = masks.all(0), masks.any(0)
    points = np.argwhere(np.ones(core.shape, bool)) * np.asarray(spacing)
    gap = np.linalg.norm(points[:, None] - points[None], axis=-1)
    to_union = np.where(union.ravel(), gap, np.inf).min(1).reshape(core.shape)
    to_outside = np.where(~core.ravel(), gap, np.inf).min(1).reshape(core.shape)
    trimap = np.where(to_union <= dilate_mm + 1e-9, 128, 0)
    return np.where(to_outside > erode_mm + 1e-9, 255, trimap)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (2.5, 0.7, 0.8), (0.5, 1.3, 0.4)])
@pytest.mark.parametrize("widths", [(0, 0), (1.0, 0.7), (0.8, 1.3), (2.6, 0.0)])
def test_band_equals_brute_force(spacing, widths):
    rng = np.random.default_rng(7)
    masks = np.zeros((3, 6, 9, 8), bool)
    masks[:, 2:5, 2:7, 2:7] = True
    masks[1:] &= rng.random((2, 6, 9, 8)) > 0.05
    masks[0, 1, 4, 4] = True
    expected = brute_force(masks, *widths, spacing)
    made = trimap_from_raters(masks, *widths, spacing=spacing, vanishing="keep")
    assert np.array_equal(made == 0, expected == 0)
    assert (made[expected == 255] == 255).all()  # "keep" may hold on to specks of the intersection


def test_two_dimensions_equal_brute_force_exactly():
    masks = np.zeros((2, 12, 14), bool)
    masks[0, 3:9, 3:10] = masks[1, 2:8, 4:11] = True
    made = trimap_from_raters(masks, 1.2, 0.9, spacing=(0.8, 0.5))
    assert np.array_equal(made, brute_force(masks, 1.2, 0.9, (0.8, 0.5)))


def raters(count=3, shape=(7, 8)):
    "Masks that share one pixel in the middle and leave the border free."
    def frame(stack):
        stack = stack.copy()
        stack[:, [0, -1]] = stack[:, :, [0, -1]] = False
        stack[:, shape[0] // 2, shape[1] // 2] = True
        stack[0, shape[0] // 2, shape[1] // 2 + 1] = True
        stack[1, shape[0] // 2, shape[1] // 2 + 1] = False
        return stack
    return arrays(bool, (count, *shape)).map(frame)


def band(masks, *widths, **more):
    "Trimap, or None where the widths leave no background."
    try:
        return trimap_from_raters(masks, *widths, vanishing="keep", **more)
    except InputError as error:
        assert "no background" in str(error)


@given(raters())
def test_without_widening_the_band_is_union_minus_intersection(masks):
    made = band(masks, 0.0)
    assert np.array_equal(made == 255, masks.all(0))
    assert np.array_equal(made == 0, ~masks.any(0))


@given(raters(), st.floats(0, 3), st.floats(0, 3))
def test_a_wider_band_only_adds_unknown(masks, one, two):
    narrow, wide = (band(masks, width) for width in sorted((one, two)))
    if wide is not None:
        assert (wide[narrow == 128] == 128).all()
        assert ((wide == 255) <= masks.all(0)).all() and ((wide == 0) <= ~masks.any(0)).all()


@given(raters(), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3))
def test_only_widths_in_voxels_matter(masks, dilate, erode, scale):
    base = band(masks, dilate, erode, spacing=(1.0, 0.6))
    doubled = band(masks, 2 * dilate, 2 * erode, spacing=(2.0, 1.2))
    assert (base is None and doubled is None) or np.array_equal(base, doubled)


@given(raters(), st.permutations(range(3)))
def test_order_of_raters_is_irrelevant(masks, order):
    one, other = band(masks, 1.0), band(masks[list(order)], 1.0)
    assert (one is None and other is None) or np.array_equal(one, other)


@given(raters(), st.floats(0, 2), st.floats(0, 2))
def test_the_two_sides_are_independent(masks, dilate, erode):
    both, outward = band(masks, dilate, erode), band(masks, dilate, 0.0)
    if both is not None:
        assert np.array_equal(both == 0, outward == 0)


def test_thick_slices_do_not_grow_into_each_other():
    mask = np.zeros((5, 15, 15), bool)
    mask[2, 4:11, 4:11] = True
    wide = trimap_from_raters([mask], 2.0, 0.0, spacing=(2.5, 0.7, 0.7))
    assert (wide[[1, 3]] == 0).all() and (wide[2] == 128).any()


# --- vanishing cores -----------------------------------------------------------------------------------------------

def two_cores():
    mask = np.zeros((20, 20), bool)
    mask[3:12, 3:12] = mask[15:17, 15:17] = True
    return mask


def test_a_vanishing_core_is_refused_with_the_width_that_works():
    with pytest.raises(InputError, match="1 of 2 foreground cores") as error:
        trimap_from_mask(two_cores(), 1.0)
    assert "less than 1 mm" in str(error.value)
    assert (trimap_from_raters([two_cores()], 1.0, 0.99) == 255).sum() == 81 + 4


def test_keep_stops_before_the_core_is_gone_and_says_so():
    trimap, info = trimap_from_mask(two_cores(), 1.0, vanishing="keep", return_info=True)
    large, small = info.cores
    assert (large.voxels, large.left, large.stopped) == (81, 49, False)
    assert (small.voxels, small.left, small.stopped) == (4, 4, True)
    assert info.after == {name: int((trimap == value).sum()) for name, value in
                          {"background": 0, "unknown": 128, "foreground": 255}.items()}
    assert "erosion stopped" in info._repr_markdown_()


def test_cores_that_touch_at_a_corner_are_one():
    mask = np.zeros((16, 16), bool)
    mask[2:9, 2:9] = mask[9:11, 9:11] = True
    trimap, info = trimap_from_mask(mask, 1.0, return_info=True)
    assert [core.voxels for core in info.cores] == [53] and (trimap[9:11, 9:11] == 128).all()


# --- Volumes and bad masks -----------------------------------------------------------------------------------------

def test_volumes_give_a_volume_on_their_grid():
    grid = dict(spacing=(2.0, 0.5), origin=(5.0, 6.0))
    volume = Volume(two_cores(), **grid, unit="HU")
    made = trimap_from_mask(volume, 0.6, vanishing="keep")
    assert (made.spacing, made.origin, made.unit) == ((2.0, 0.5), (5.0, 6.0), "")
    assert np.array_equal(made.array, trimap_from_mask(two_cores(), 0.6, (2.0, 0.5), "keep"))


@pytest.mark.parametrize("dtype, top", [(np.uint8, 1), (np.uint8, 255), (float, 1), (np.int16, 255), (bool, 1)])
def test_masks_may_be_binary_of_any_type(dtype, top):
    made = trimap_from_mask((two_cores() * top).astype(dtype), 1.0, vanishing="keep")
    assert np.array_equal(made, trimap_from_mask(two_cores(), 1.0, vanishing="keep"))


@pytest.mark.parametrize("masks, more, words", [
    ([two_cores() * 0.5], {}, "binary"),
    ([two_cores() * 2], {}, "binary"),
    ([two_cores(), two_cores()[:-1]], {}, "shapes"),
    ([two_cores(), two_cores() & False], {}, r"without a common voxel, masks \[1\] being empty"),
    ([two_cores() | True], {}, "union fills"),
    ([two_cores()], dict(dilate_mm=0), "no unknown"),
    ([two_cores()], dict(dilate_mm=0.9), "narrower than a voxel"),
    ([two_cores()], dict(dilate_mm=40, erode_mm=0), "no background"),
    ([two_cores()], dict(dilate_mm=-1), "dilate_mm"),
    ([two_cores()], dict(dilate_mm=np.nan), "dilate_mm"),
    ([two_cores()], dict(erode_mm="1"), "erode_mm"),
    ([two_cores()], dict(spacing=(0, 1)), "spacing"),
    ([two_cores()], dict(spacing=(1, 1, 1)), "spacing"),
    ([two_cores()], dict(vanishing="drop"), "vanishing"),
    ([], {}, "masks"),
    (None, {}, "masks: got None"),
    (3, {}, "masks: got 3"),
    (iter([two_cores()]), {}, "masks: got <"),
    ([Volume(np.stack([two_cores()] * 3, -1), channels=True)], {}, "masks: got a Volume with channels"),
    ([two_cores()], dict(dilate_mm=1j), "dilate_mm"),
    (two_cores(), {}, "trimap_from_mask"),
    (Volume(two_cores()), {}, "trimap_from_mask"),
    ([Volume(two_cores(), 1.0), Volume(two_cores(), 2.0)], {}, "voxel sizes"),
    ([Volume(two_cores(), 1.0)], dict(spacing=2.0), "voxel sizes"),
    ([Volume(two_cores()), Volume(two_cores(), origin=(0, 9))], {}, "masks: .*mm away"),
    ([Volume(two_cores()), Volume(two_cores(), direction=np.diag([1, -1]))], {}, "masks: .*mm away"),
])
def test_bad_raters_are_refused(masks, more, words):
    with pytest.raises(InputError, match=words):
        trimap_from_raters(masks, **more)


def test_masks_are_not_changed():
    masks = np.stack([two_cores()] * 2)
    masks.flags.writeable = False
    trimap_from_raters(masks, 1.0, vanishing="keep")


# --- cleaning greys ------------------------------------------------------------------------------------------------

GREYS = np.array([[0, 0, 20, 96], [128, 140, 230, 255]], np.uint8)


def test_only_exact_greys_are_known_by_default():
    trimap, odd = clean_trimap(GREYS, return_info=True)
    assert np.array_equal(trimap, [[0, 0, 128, 128], [128, 128, 128, 255]])
    assert odd == {20: 1, 96: 1, 140: 1, 230: 1}
    with pytest.warns(UserWarning, match="4 of 8 voxels"):
        clean_trimap(GREYS)


def test_known_greys_can_be_given():
    trimap, _ = clean_trimap(GREYS.astype(np.int16), known=(25, 230), return_info=True)
    assert np.array_equal(trimap, [[0, 0, 0, 128], [128, 128, 255, 255]])


@pytest.mark.filterwarnings("error")
def test_a_clean_trimap_passes_without_warning():
    assert np.array_equal(clean_trimap(GOOD), GOOD)
    assert np.array_equal(clean_trimap(HALF_BAND), GOOD)


@pytest.mark.parametrize("bad, more", [
    (GREYS // 100, {}), (GREYS > 100, {}), (GREYS.astype(float), {}), (GREYS, dict(known=(200, 100))),
    (GREYS, dict(known="loose")), (GREYS, dict(known=None)), (GREYS, dict(known=("a", 3))), (np.minimum(GREYS, 200), {}),
])
def test_what_is_no_grey_trimap_is_refused(bad, more):
    with pytest.raises(InputError):
        clean_trimap(bad, **more)


# --- files ---------------------------------------------------------------------------------------------------------

def test_a_picture_with_greys_is_read(tmp_path):
    Image.fromarray(GREYS).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([GREYS] * 3, -1)).save(tmp_path / "colour.png")
    for name in ("grey.png", "colour.png"):
        trimap, odd = trimap_from_file(tmp_path / name, return_info=True)
        assert np.array_equal(trimap.array, [[0, 0, 128, 128], [128, 128, 128, 255]]) and sum(odd.values()) == 4
        assert (trimap.shape, trimap.channels) == ((2, 4), False)


def test_a_volume_file_keeps_its_grid(tmp_path):
    write(tmp_path / "trimap.nii.gz", Volume(GOOD, (2.5, 0.7, 0.7), (1.0, 2.0, 3.0)))
    trimap = trimap_from_file(tmp_path / "trimap.nii.gz")
    assert np.array_equal(trimap.array, GOOD)
    assert np.allclose(trimap.spacing, (2.5, 0.7, 0.7)) and np.allclose(trimap.origin, (1, 2, 3))


def test_a_coloured_picture_is_refused(tmp_path):
    Image.fromarray(np.stack([GREYS, GREYS, GREYS[::-1]], -1)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match="colour image"):
        trimap_from_file(tmp_path / "colour.png")


def test_a_label_file_is_refused(tmp_path):
    Image.fromarray(GOOD[0] // 127).save(tmp_path / "labels.png")
    with pytest.raises(InputError):
        trimap_from_file(tmp_path / "labels.png")


def test_ragged_masks_are_refused_by_name():
    with pytest.raises(InputError, match="masks.*uneven"):
        trimap_from_raters([[[0, 1], [1]], [[0, 1], [1]]])
