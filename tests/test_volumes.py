"""Grids in patient space: resampling, cropping and the way back, checked against SimpleITK and closed forms."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings, strategies as st
from scipy.spatial.transform import Rotation

from medmatting.checks import InputError
from medmatting.volumes import (Volume, check_same_grid, crop, crop_nodule, paste, positions, resample,
                                resample_like)

OBLIQUE = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()


def grid(shape):
    return np.moveaxis(np.indices(shape), 0, -1)


def ramp(shape=(7, 9, 8), spacing=(2.5, 0.7, 0.9), origin=(-12, 30, 5), direction=OBLIQUE):
    "A volume whose value is linear in the patient position, and that linear function."
    volume = Volume(np.zeros(shape), spacing, origin, direction)
    law = lambda where: where @ [0.3, -1.7, 2.2] + 4
    return volume.with_array(law(positions(volume, grid(shape)))), law


def to_sitk(volume):
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.spacing[::-1])
    image.SetOrigin(volume.origin)
    image.SetDirection(volume.direction[:, ::-1].ravel())
    return image


def itk_resample(volume, like, interpolator, fill=0.0):
    return sitk.GetArrayFromImage(sitk.Resample(to_sitk(volume), to_sitk(like), sitk.Transform(), interpolator, fill))


def test_positions_agree_with_itk():
    volume, _ = ramp()
    image = to_sitk(volume)
    for index in [(0, 0, 0), (3, 8, 2), (6, 0, 7)]:
        assert np.allclose(positions(volume, index), image.TransformIndexToPhysicalPoint(index[::-1]))


@pytest.mark.parametrize("direction", [None, OBLIQUE])
def test_linear_ramp_is_exact_at_every_centre(direction):
    volume, law = ramp(direction=direction)
    fine = resample(volume, 0.5)
    index = positions(fine, grid(fine.shape))
    old = (index - volume.origin) @ volume.direction / volume.spacing
    inside = ((old >= 0) & (old <= np.array(volume.shape) - 1)).all(-1)
    assert inside.mean() > 0.5
    assert np.abs(fine.array - law(index))[inside].max() < 1e-4
    assert fine.array.dtype == np.float32


def test_extent_centre_and_axes_survive():
    volume, _ = ramp()
    fine = resample(volume, 0.5)
    assert fine.shape == (35, 13, 14)  # 17.5, 6.3 and 7.2 mm
    middle = lambda v: positions(v, (np.array(v.shape) - 1) / 2)
    assert np.allclose(middle(fine), middle(volume))
    assert np.array_equal(fine.direction, volume.direction)


@pytest.mark.parametrize("order, interpolator", [("linear", sitk.sitkLinear), ("nearest", sitk.sitkNearestNeighbor)])
@pytest.mark.parametrize("direction", [None, OBLIQUE])
def test_resample_agrees_with_simpleitk(order, interpolator, direction):
    rng = np.random.default_rng(1)
    volume = Volume(rng.normal(size=(7, 11, 9)).astype(np.float32), (2.3, 0.7, 0.83), (4, -3, 8), direction)
    fine = resample(volume, 0.61, order)
    assert np.abs(fine.array - itk_resample(volume, fine, interpolator)).max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), shift=st.tuples(*[st.floats(-3, 3)] * 3),
       seed=st.integers(0, 99))
def test_resample_like_agrees_with_simpleitk_for_any_two_grids(angles, shift, seed):
    rng = np.random.default_rng(seed)
    volume = Volume(rng.normal(size=(6, 7, 8)).astype(np.float32), (1.5, 0.7, 0.9), (-3, -3, -4), OBLIQUE)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    like = Volume(np.zeros((5, 6, 4)), (0.9, 1.1, 0.8), np.add((-2, -2, -2), shift), turn)
    ours, theirs = resample_like(volume, like, fill=-9).array, itk_resample(volume, like, sitk.sitkLinear, -9.0)
    # Points that fall on a face to rounding may be inside for one and outside for the other.
    assert (np.abs(ours - theirs) < 1e-4).mean() > 0.98


def test_masks_keep_dtype_and_levels():
    trimap = Volume(np.random.default_rng(0).choice(np.array([0, 128, 255], np.uint8), (4, 6, 6)), (2.5, 0.7, 0.7))
    fine = resample(trimap, 0.5, "nearest")
    assert fine.array.dtype == np.uint8 and set(np.unique(fine.array)) <= {0, 128, 255}
    assert resample(trimap.with_array(trimap.array > 0), 0.5, "nearest").array.dtype == bool


def test_matte_returns_to_native_grid():
    # 2.5 mm is 5 x 0.5 mm: every native centre coincides with a fine one, so the round trip is exact.
    volume = Volume(np.random.default_rng(0).random((5, 12, 10), np.float32), (2.5, 1.5, 0.5), (1, 2, 3), OBLIQUE)
    fine = resample(volume, 0.5)
    back = resample_like(fine, volume)
    check_same_grid("back", back, volume)
    assert np.abs(back.array - volume.array).max() < 1e-5


def test_outside_is_fill_and_border_voxels_are_whole():
    volume = Volume(np.ones((3, 3), np.float32), 2.0)
    like = Volume(np.zeros((12, 12)), 1.0, origin=(-3.5, -3.5))  # centres -3.5 .. 7.5; volume covers -1 .. 5
    inside = resample_like(volume, like, fill=-1).array == 1
    expected = np.zeros(12, bool)
    expected[3:9] = True
    assert np.array_equal(inside, expected[:, None] & expected)


def test_colour_and_float16():
    image = Volume(np.random.default_rng(0).random((5, 6, 3)), 1.0, channels=True)
    fine = resample(image, 0.5)
    assert fine.array.shape == (10, 12, 3) and fine.channels
    assert np.allclose(fine.array[..., 1], resample(Volume(image.array[..., 1]), 0.5).array)
    assert resample(Volume(np.ones((4, 4), np.float16)), 0.5).array.dtype == np.float32


def test_nan_is_not_hidden():
    volume = Volume(np.zeros((3, 4, 4)), 1.0)
    volume.array[1, 1, 1] = np.nan
    assert np.isnan(resample(volume, 0.5).array).any()


def test_crop_paste_and_positions():
    volume, law = ramp()
    part = crop(volume, (slice(2, 5), (1, 9), slice(None)))
    assert part.shape == (3, 8, 8) and np.allclose(part.array, law(positions(part, grid(part.shape))))
    whole = paste(part, volume, fill=-1)
    assert np.array_equal(whole.array[2:5, 1:9], part.array)
    assert (whole.array == -1).sum() == volume.array.size - part.array.size
    check_same_grid("whole", whole, volume)


@pytest.mark.parametrize("box", [(slice(0, 8), slice(None), slice(None)), (slice(-2, None),) * 3, (slice(3, 3),) * 3,
                                 (slice(None, None, 2),) * 3, (slice(None),) * 2])
def test_bad_boxes_are_refused(box):
    with pytest.raises(InputError, match="box"):
        crop(ramp()[0], box)


def test_paste_refuses_other_voxels():
    volume, _ = ramp()
    part = crop(volume, (slice(2, 5),) * 3)
    for other in (Volume(part.array, (2.5, 0.7, 0.8), part.origin, part.direction),
                  Volume(part.array, part.spacing, np.add(part.origin, 0.3), part.direction),
                  Volume(part.array, part.spacing, part.origin),
                  Volume(part.array, part.spacing, positions(volume, (5, 0, 0)), part.direction)):
        with pytest.raises(InputError, match="volume"):
            paste(other, volume)


def test_nodule_crop_of_the_paper():
    ct = Volume(np.arange(40 * 200 * 180, dtype=np.int32).reshape(40, 200, 180), (2.5, 0.7, 0.7), (1, 2, 3))
    masks = np.zeros((4, 40, 200, 180), np.uint8)
    masks[0, 20:24, 95:105, 80:100] = 1
    masks[3, 19:22, 97:107, 80:100] = 1  # union: slices 19..23, rows 95..106, columns 80..99
    part, cropped = crop_nodule(ct, masks)
    assert part.shape == (11, 128, 128)  # 5 slices of nodule, 3 on each end
    assert part.array[0, 0, 0] == ct.array[16, 101 - 64, 90 - 64]
    assert np.allclose(part.origin, positions(ct, (16, 37, 26)))
    assert cropped.shape == (4, 11, 128, 128) and cropped.dtype == bool and cropped.sum() == masks.sum()


def test_nodule_at_the_border_gets_real_voxels_only():
    ct = Volume(np.arange(10 * 140 * 100).reshape(10, 140, 100))
    masks = np.zeros((1, 10, 140, 100), bool)
    masks[0, 0:9, 0:6, 94:100] = True
    part, cropped = crop_nodule(ct, [Volume(masks[0])])
    assert part.shape == (10, 128, 100)  # slices end with the scan; columns: the whole, shorter axis
    assert part.array[0, 0, 0] == ct.array[0, 0, 0] and cropped.sum() == masks.sum()


@pytest.mark.parametrize("masks", [np.zeros((2, 10, 20, 20)), np.full((1, 10, 20, 20), 0.5), np.ones((10, 20, 20)),
                                   [], np.full((1, 10, 20, 20), 128, np.uint8)])
def test_bad_masks_are_refused(masks):
    with pytest.raises(InputError, match="masks"):
        crop_nodule(Volume(np.zeros((10, 20, 20))), masks)


def test_nodule_larger_than_the_square_is_refused():
    with pytest.raises(InputError, match="size_px"):
        crop_nodule(Volume(np.zeros((10, 20, 20))), np.ones((1, 10, 20, 20)), size_px=12)


@pytest.mark.parametrize("call, name", [
    (lambda v: resample(v.array), "volume"), (lambda v: resample(v, 0), "spacing"),
    (lambda v: resample(v, 0.0005), "spacing"), (lambda v: resample(v, 0.5, "cubic"), "order"),
    (lambda v: resample(v, (1, 1)), "spacing"), (lambda v: resample(v, np.nan), "spacing"),
    (lambda v: resample(v.with_array(v.array.astype(complex))), "volume"),
    (lambda v: resample_like(v, Volume(np.zeros((3, 3)))), "reference"),
    (lambda v: Volume(v.array, direction=np.ones((3, 3))), "direction"),
    (lambda v: Volume(v.array, direction=np.eye(3) + np.eye(3, k=1) * 0.2), "direction"),
    (lambda v: Volume(v.array, origin=(np.nan, 0, 0)), "origin"),
    (lambda v: Volume(v.array, spacing=(0, 1, 1)), "spacing"),
    (lambda v: Volume(v.array, unit=3), "unit"), (lambda v: Volume(v.array, origin=2.0), "origin"),
    (lambda v: Volume(v.array, origin=("a", "b", "c")), "origin"), (lambda v: Volume(v.array, direction="xyz"), "direction"),
    (lambda v: Volume(v.array, direction=[[1], [1, 2]]), "direction"), (lambda v: Volume(v.array.astype(str)), "array"),
    (lambda v: Volume(v.array.astype(object)), "array"),
    (lambda v: check_same_grid("trimap", Volume(v.array[1:]), v), "trimap"),
])
def test_bad_input_is_refused_by_name(call, name):
    with pytest.raises(InputError, match=name):
        call(ramp(shape=(4, 4, 4))[0])


def test_masks_of_0_and_255_crop_like_bool():
    ct, mask = Volume(np.zeros((10, 20, 20))), np.zeros((1, 10, 20, 20), np.uint8)
    mask[0, 3:6, 4:9, 4:9] = 255
    part, cropped = crop_nodule(ct, mask, size_px=12)
    assert cropped.dtype == bool and cropped.sum() == 75 and (crop_nodule(ct, mask > 0, size_px=12)[1] == cropped).all()


def test_ragged_masks_are_refused_by_name():
    for ragged in ([[[0, 1], [1]], [[0, 1], [1]]], [[[[0, 1]], [[1]]]]):
        with pytest.raises(InputError, match="masks was nested lists|masks.*uneven"):
            crop_nodule(Volume(np.zeros((1, 2, 2))), ragged)
