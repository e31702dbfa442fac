"""Reading and writing image files: nibabel and SimpleITK as independent oracles, every format there and back, and every fault."""

import errno
import gzip
import struct
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from medmatting.checks import InputError, WriteError, check_spacing
from medmatting.files import read, write
from medmatting.volumes import Volume, check_same_grid, positions

TURN = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()
RNG = np.random.default_rng(0)
VOLUMES = [".nii", ".nii.gz", ".nrrd", ".mha"]


def scan(dtype=np.int16, shape=(4, 5, 6), **changes):
    array = RNG.integers(-1000, 400, shape).astype(dtype)
    return Volume(array, **{**dict(spacing=(2.5, 0.7, 0.8), origin=(-10.5, 5, 40), direction=TURN, unit="HU"), **changes})


def same(a, b):
    check_same_grid("volume", a, b)
    return np.array_equal(a.array, b.array, equal_nan=True) and a.array.dtype == b.array.dtype and a.unit == b.unit


# -- volumes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", [*VOLUMES, ".npz"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64, np.int32])
def test_there_and_back(tmp_path, ending, dtype):
    volume = scan(dtype)
    assert same(read(write(tmp_path / f"a{ending}", volume)), volume)


@pytest.mark.parametrize("ending", [*VOLUMES, ".npz"])
def test_two_axes_one_slice_and_colour(tmp_path, ending):
    flat = Volume(RNG.random((5, 6), np.float32), (0.7, 0.8), (3, 4))
    slab = scan(shape=(1, 5, 6))
    colour = scan(np.uint8, (4, 5, 6, 3), channels=True)
    for name, volume in (("flat", flat), ("slab", slab), ("colour", colour)):
        back = read(write(tmp_path / f"{name}{ending}", volume))
        assert same(back, volume) and back.channels == volume.channels


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), origin=st.tuples(*[st.floats(-400, 400)] * 3),
       spacing=st.tuples(*[st.floats(0.1, 10)] * 3), mirror=st.booleans(), ending=st.sampled_from(VOLUMES))
def test_any_place_survives(tmp_path, angles, origin, spacing, mirror, ending):
    direction = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * (-1 if mirror else 1)
    volume = Volume(np.zeros((3, 4, 5), np.uint8), spacing, origin, direction)
    check_same_grid("back", read(write(tmp_path / f"a{ending}", volume)), volume)


def nifti_positions(image, index):
    "Patient (LPS) position of an array-order index by nibabel, which counts (x, y, z) in RAS."
    return (image.affine @ [*index[::-1], 1])[:3] * [-1, -1, 1]


def test_our_nifti_means_the_same_to_nibabel(tmp_path):
    volume = scan()
    theirs = nib.load(write(tmp_path / "a.nii.gz", volume))
    assert np.array_equal(theirs.get_fdata(), volume.array.T)
    assert np.allclose(theirs.get_qform(coded=True)[0], theirs.affine, atol=1e-4)  # readers differ in which they use
    for index in [(0, 0, 0), (3, 4, 5), (1, 2, 0)]:
        assert np.allclose(nifti_positions(theirs, index), positions(volume, index), atol=1e-4)


@pytest.mark.parametrize("ending", VOLUMES)
def test_our_files_mean_the_same_to_simpleitk(tmp_path, ending):
    volume = scan()
    theirs = sitk.ReadImage(str(write(tmp_path / f"a{ending}", volume)))
    assert np.array_equal(sitk.GetArrayFromImage(theirs), volume.array)
    for index in [(0, 0, 0), (3, 4, 5), (1, 2, 0)]:
        assert np.allclose(theirs.TransformIndexToPhysicalPoint(index[::-1]), positions(volume, index), atol=1e-4)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("form", ["qform", "sform"])
def test_nifti_of_others_means_the_same_to_us(tmp_path, kind, form):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TURN * [0.7, 0.8, 2.5], (10, -20, 30)
    array = RNG.integers(-1000, 400, (6, 5, 4)).astype(">i2")
    image = kind(array, affine)
    image.set_qform(affine if form == "qform" else None, int(form == "qform"))
    image.set_sform(affine if form == "sform" else None, int(form == "sform"))
    nib.save(image, tmp_path / "a.nii.gz")
    ours, theirs = read(tmp_path / "a.nii.gz"), nib.load(tmp_path / "a.nii.gz")
    assert np.array_equal(ours.array, array.T) and np.allclose(ours.spacing, (2.5, 0.8, 0.7))
    assert ours.array.dtype == np.int16 and ours.array.flags.c_contiguous
    for index in [(0, 0, 0), (3, 4, 5), (1, 2, 0)]:
        assert np.allclose(positions(ours, index), nifti_positions(theirs, index), atol=1e-4)


def test_nifti_of_simpleitk_means_the_same_to_us(tmp_path):
    volume, path = scan(), tmp_path / "a.nii.gz"
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.spacing[::-1])
    image.SetOrigin(volume.origin)
    image.SetDirection(volume.direction[:, ::-1].ravel())
    sitk.WriteImage(image, str(path))
    check_same_grid("ours", read(path), volume)
    assert np.array_equal(read(path).array, volume.array)
    colour = RNG.integers(0, 256, (4, 5, 6, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(path))
    assert np.array_equal(read(path).array, colour) and read(path).channels


def test_nifti_in_other_units_and_colours(tmp_path):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([500, 600, 700, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii")
    assert np.allclose(read(tmp_path / "a.nii").spacing, (0.7, 0.6, 0.5))
    colour = RNG.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    records = colour.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    nib.save(nib.Nifti1Image(records, np.eye(4)), tmp_path / "b.nii")
    assert np.array_equal(read(tmp_path / "b.nii").array, colour.transpose(2, 1, 0, 3))


def test_flat_nifti_that_is_not_axial_is_one_slice(tmp_path):
    affine = np.array([[0, 0, 2, 5], [0.5, 0, 0, 6], [0, 0.7, 0, 7], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(np.zeros((3, 4), np.int16), affine), tmp_path / "a.nii")
    volume = read(tmp_path / "a.nii")
    assert volume.shape == (1, 4, 3) and np.allclose(volume.spacing, (2, 0.7, 0.5))


def test_nifti_slope_and_intercept(tmp_path):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(4, 3, 2), np.eye(4)), path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<ff", data, 112, 0.5, -1024.0)
    path.write_bytes(data)
    assert np.allclose(read(path).array, nib.load(path).get_fdata().T)
    assert read(path).array.min() == -1024


def test_four_axes(tmp_path):
    for ending in VOLUMES:
        image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
        sitk.WriteImage(sitk.JoinSeries([image]), str(tmp_path / f"one{ending}"))
        assert read(tmp_path / f"one{ending}").shape == (4, 5, 6)
        sitk.WriteImage(sitk.JoinSeries([image] * 2), str(tmp_path / f"two{ending}"))
        with pytest.raises(InputError, match="4 axes"):
            read(tmp_path / f"two{ending}")


def test_complex_and_sheared_files_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.complex64), np.eye(4)), tmp_path / "c.nii")
    with pytest.raises(InputError, match="complex"):
        read(tmp_path / "c.nii")
    affine = np.eye(4)
    affine[0, 1] = 0.4
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), affine), tmp_path / "s.nii")
    with pytest.raises(InputError, match="sheared"):
        read(tmp_path / "s.nii")


@pytest.mark.parametrize("zoom", [0.0, np.nan, np.inf])
def test_nifti_voxel_size_of_zero_is_refused(tmp_path, zoom):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(np.eye(4), 1)
    nib.save(image, path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<f", data, 80, zoom)
    path.write_bytes(data)
    with pytest.raises(InputError, match="voxel size"):
        read(path)


def test_nan_is_kept(tmp_path):
    volume = scan(np.float32)
    volume.array[1, 2, 3] = np.nan
    for ending in (*VOLUMES, ".npz"):
        assert same(read(write(tmp_path / f"a{ending}", volume)), volume)


def test_detached_headers_are_read(tmp_path):
    volume = scan()
    image = sitk.GetImageFromArray(volume.array)
    for name in ("a.mhd", "b.nhdr"):
        sitk.WriteImage(image, str(tmp_path / name))
        assert np.array_equal(read(tmp_path / name).array, volume.array)
    (tmp_path / "a.raw").unlink()
    with pytest.raises(InputError, match="a.mhd"):
        read(tmp_path / "a.mhd")


# -- damaged, missing and mistaken files ---------------------------------------------------------------------------

@pytest.mark.parametrize("ending", [*VOLUMES, ".npy", ".npz", ".png", ".tif"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9, 0.995])
def test_truncated_files_are_refused(tmp_path, ending, keep, capfd):
    path = tmp_path / f"a{ending}"
    array = RNG.integers(0, 255, (64, 65)).astype(np.uint8)
    write(path, array if ending in (".png", ".tif", ".npy") else Volume(array[None].repeat(3, 0)))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=f"a{ending}, which cannot be read"):
        read(path)
    assert capfd.readouterr().err == ""


def test_nifti_with_one_byte_missing_is_refused(tmp_path):
    plain = write(tmp_path / "a.nii", scan())
    plain.write_bytes(plain.read_bytes()[:-1])
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))  # an intact gzip file around a short image
    for path in (plain, packed):
        with pytest.raises(InputError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize("damage", ["bit", "checksum", "no trailer"])
def test_damaged_gzip_stream_is_refused(tmp_path, damage):
    # Stored blocks: a flipped bit changes a voxel and nothing else notices but the checksum.
    plain = write(tmp_path / "a.nii", scan(shape=(4, 50, 60))).read_bytes()
    data = bytearray(gzip.compress(plain, 0))
    data[{"bit": -60, "checksum": -8, "no trailer": -1}[damage]] ^= 1
    path = tmp_path / "a.nii.gz"
    path.write_bytes(data[:-8] if damage == "no trailer" else data)
    with pytest.raises(InputError, match="truncated or damaged"):
        read(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(min_size=1, max_size=600), ending=st.sampled_from([*VOLUMES, ".png", ".tif", ".npy", ".npz", ".dcm"]))
def test_junk_is_refused_in_every_format(tmp_path, junk, ending):
    path = tmp_path / f"junk{ending}"
    path.write_bytes(junk)
    with pytest.raises(InputError):
        read(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 347), value=st.integers(0, 255))
def test_a_damaged_nifti_header_never_gives_a_traceback(tmp_path, at, value):
    path = write(tmp_path / "a.nii", scan())
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data)
    try:
        assert isinstance(read(path), Volume)
    except InputError:
        pass


@pytest.mark.parametrize("wrong", VOLUMES + [".png", ".tif", ".npy", ".npz"])
@pytest.mark.parametrize("right", [".nii", ".nrrd", ".npz"])
def test_wrong_endings_are_refused(tmp_path, right, wrong):
    if wrong.startswith(right):
        return
    path = write(tmp_path / f"a{right}", scan()).rename(tmp_path / f"b{wrong}")
    with pytest.raises(InputError, match="b" + wrong):
        read(path)


def test_missing_empty_and_unknown(tmp_path):
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "notes.txt").write_text("hello")
    for name, words in (("none.nii", "does not exist"), ("empty.nii.gz", "an empty file"), ("notes.txt", "'.txt'")):
        with pytest.raises(InputError, match=words) as refusal:
            read(tmp_path / name)
        assert "\n" not in str(refusal.value)


def test_options_that_do_not_apply_are_refused(tmp_path):
    path = write(tmp_path / "a.nii", scan())
    for option in (dict(key="x"), dict(series="1.2"), dict(channels=True)):
        with pytest.raises(InputError, match=next(iter(option))):
            read(path, **option)
    volume = read(path, spacing=(1, 2, 3), unit="")
    assert volume.spacing == (1, 2, 3) and volume.unit == ""


# -- pictures ------------------------------------------------------------------------------------------------------

GREY8 = RNG.integers(0, 256, (7, 9)).astype(np.uint8)
GREY16 = RNG.integers(0, 65536, (7, 9)).astype(np.uint16)
RGB8 = RNG.integers(0, 256, (7, 9, 3)).astype(np.uint8)
RGB16 = RNG.integers(0, 65536, (7, 9, 3)).astype(np.uint16)


@pytest.mark.parametrize("ending", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize("array", [GREY8, GREY16, RGB8], ids=["grey8", "grey16", "rgb8"])
def test_pictures_there_and_back(tmp_path, array, ending):
    back = read(write(tmp_path / f"a{ending}", array))
    assert np.array_equal(back.array, array) and back.array.dtype == array.dtype
    assert back.channels == (array.ndim == 3) and back.spacing == (1, 1)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bit_colour_is_not_cut_to_eight(tmp_path, ending):
    path = str(tmp_path / f"a{ending}")
    sitk.WriteImage(sitk.GetImageFromArray(RGB16, isVector=True), path)
    assert np.array_equal(read(path).array, RGB16)


def test_printing_resolution_is_not_a_spacing(tmp_path):
    Image.fromarray(RGB8).save(tmp_path / "a.tif", dpi=(72, 72))
    assert read(tmp_path / "a.tif").spacing == (1, 1)
    assert read(tmp_path / "a.tif", spacing=0.1).spacing == (0.1, 0.1)


def test_one_bit_palette_and_lzw(tmp_path):
    Image.fromarray(GREY8 > 99).save(tmp_path / "bit.png")
    assert np.array_equal(read(tmp_path / "bit.png").array, (GREY8 > 99) * np.uint8(255))
    Image.fromarray(GREY8 > 99).save(tmp_path / "bit.tif", compression="group4")
    assert np.array_equal(read(tmp_path / "bit.tif").array, (GREY8 > 99) * np.uint8(255))
    trimap = np.array([[0, 128, 255]], np.uint8)
    Image.fromarray(trimap).convert("P").save(tmp_path / "grey.png")
    assert np.array_equal(read(tmp_path / "grey.png").array, trimap)
    colours = Image.fromarray(RGB8).quantize(8)
    colours.save(tmp_path / "colour.png")
    assert np.array_equal(read(tmp_path / "colour.png").array, np.asarray(colours.convert("RGB")))
    Image.fromarray(RGB8).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    assert np.array_equal(read(tmp_path / "lzw.tif").array, RGB8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency(tmp_path, mode):
    for opacity in (255, 254):
        image = Image.fromarray(RGB8 if mode == "RGBA" else GREY8).convert(mode)
        image.putalpha(opacity)
        image.save(tmp_path / f"{opacity}.png")
    assert np.array_equal(read(tmp_path / "255.png").array, RGB8 if mode == "RGBA" else GREY8)
    with pytest.raises(InputError, match="transparent"):
        read(tmp_path / "254.png")


def test_sixteen_bit_transparency(tmp_path):
    for opacity in (65535, 65534):
        array = np.dstack([RGB16, np.full(RGB16.shape[:2], opacity, np.uint16)])
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / f"{opacity}.png"))
    assert np.array_equal(read(tmp_path / "65535.png").array, RGB16)
    with pytest.raises(InputError, match="transparent"):
        read(tmp_path / "65534.png")


def test_other_kinds_are_refused(tmp_path):
    Image.fromarray(RGB8).convert("CMYK").save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="CMYK"):
        read(tmp_path / "a.tif")
    Image.fromarray(GREY8).save(tmp_path / "b.tif", save_all=True, append_images=[Image.fromarray(GREY8[1:])])
    with pytest.raises(InputError, match="pages"):
        read(tmp_path / "b.tif")
    with pytest.raises(InputError, match="lower case"):
        write(tmp_path / "c.jpg", GREY8)


def test_turned_photograph(tmp_path):
    image = Image.fromarray(RGB8)
    tags = image.getexif()
    tags[274] = 6  # the camera was held upright
    image.save(tmp_path / "a.png", exif=tags)
    assert np.array_equal(read(tmp_path / "a.png").array, np.rot90(RGB8, -1))


def test_pages_are_slices(tmp_path):
    for array in (RNG.integers(0, 65536, (4, 7, 9)).astype(np.uint16), RNG.random((4, 7, 9), np.float32)):
        back = read(write(tmp_path / "a.tif", array))
        assert np.array_equal(back.array, array) and back.array.dtype == array.dtype


def test_matte_as_png_is_rounded(tmp_path):
    alpha = np.linspace(0, 1, 1001, dtype=np.float32).reshape(7, 143)
    eight, sixteen = (read(write(tmp_path / f"{bits}.png", alpha, bits=bits)).array for bits in (8, 16))
    assert eight.dtype == np.uint8 and np.abs(eight / 255 - alpha).max() <= 0.5 / 255 + 1e-6
    assert sixteen.dtype == np.uint16 and np.abs(sixteen / 65535 - alpha).max() <= 0.5 / 65535 + 1e-6
    assert np.array_equal(read(write(tmp_path / "mask.png", alpha > 0.5)).array, (alpha > 0.5) * np.uint8(255))


@pytest.mark.parametrize("array, words", [
    (np.full((3, 3), 1.5), "0, 1"), (np.full((3, 3), np.nan), "NaN"), (np.full((3, 3), 7), "uint8"),
    (np.zeros((2, 3, 4)), "one image"), (RGB16, "one image"), (np.zeros((3, 3), complex), "real")])
def test_what_png_cannot_hold_is_refused(tmp_path, array, words):
    with pytest.raises(InputError, match=words):
        write(tmp_path / "a.png", array)
    assert not list(tmp_path.iterdir())


# -- NumPy ---------------------------------------------------------------------------------------------------------

def test_npy_and_npz_keys(tmp_path):
    array = RNG.integers(-1000, 400, (4, 5, 6)).astype(np.int16)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(read(tmp_path / "a.npy", spacing=2, unit="HU").array, array)
    np.savez(tmp_path / "one.npz", ct=array, spacing=(2.5, 0.7, 0.8))
    assert read(tmp_path / "one.npz").spacing == (2.5, 0.7, 0.8)
    np.savez(tmp_path / "two.npz", ct=array, other=array + 1, spacing_mm_zyx=(2.5, 0.7, 0.8))
    with pytest.raises(InputError, match="one of ct, other"):
        read(tmp_path / "two.npz")
    volume = read(tmp_path / "two.npz", key="other")
    assert np.array_equal(volume.array, array + 1) and volume.spacing == (2.5, 0.7, 0.8)


def test_colour_or_three_columns_must_be_said(tmp_path):
    np.save(tmp_path / "a.npy", RGB8)
    with pytest.raises(InputError, match="channels"):
        read(tmp_path / "a.npy")
    assert read(tmp_path / "a.npy", channels=True).shape == (7, 9)
    assert read(tmp_path / "a.npy", channels=False).shape == (7, 9, 3)


def test_python_objects_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemExit('a pickle was executed')",)

    np.save(tmp_path / "a.npy", np.array([Bomb()], object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", array=np.array([1, "x"], object))
    (tmp_path / "c.npy").write_bytes(b"\x80\x04K\x01.")
    for name, words in (("a.npy", "Python objects"), ("b.npz", "Python objects"), ("c.npy", "magic")):
        with pytest.raises(InputError, match=words):
            read(tmp_path / name)


# -- writing and its faults ----------------------------------------------------------------------------------------

def test_arrays_need_a_place(tmp_path):
    ct, alpha = scan(), RNG.random((4, 5, 6), np.float32)
    with pytest.raises(InputError, match="like=ct"):
        write(tmp_path / "a.nii", alpha)
    back = read(write(tmp_path / "a.nii.gz", alpha, like=ct))
    assert np.array_equal(back.array, alpha) and back.unit == ""
    check_same_grid("back", back, ct)
    with pytest.raises(InputError, match="shape"):
        write(tmp_path / "b.nii", alpha[1:], like=ct)
    with pytest.raises(InputError, match="same grid"):
        write(tmp_path / "b.nii", Volume(alpha), like=ct)


def test_masks_and_half_precision_become_storable(tmp_path):
    volume = scan()
    mask = read(write(tmp_path / "a.nii.gz", volume.array > 0, like=volume))
    assert mask.array.dtype == np.uint8 and np.array_equal(mask.array, volume.array > 0)
    assert read(write(tmp_path / "b.mha", volume.array.astype(np.float16), like=volume)).array.dtype == np.float32


def test_two_file_formats_are_not_written(tmp_path):
    for name in ("a.mhd", "a.nhdr", "a.NII", "a", "a.jpg", "a.DCM"):
        with pytest.raises(InputError, match="path"):
            write(tmp_path / name, scan())
    assert not list(tmp_path.iterdir())


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_file(image, path, **kwargs):
    "A writer that stops in the middle and reports success, as C libraries can on a full disk."
    WRITE(image, path, **kwargs)
    with open(path, "r+b") as file:
        file.truncate(400)


def wrong_voxels(image, path, **kwargs):
    "A file of the right size whose last block never reached the disk."
    WRITE(image * 0, path, **kwargs)


WRITE = sitk.WriteImage


@pytest.mark.parametrize("ending, target, fault", [
    (".nii.gz", "nibabel.save", no_space), (".mha", "SimpleITK.WriteImage", half_a_file),
    (".nrrd", "SimpleITK.WriteImage", no_space), (".nrrd", "SimpleITK.WriteImage", wrong_voxels), (".npz", "numpy.savez_compressed", no_space),
    (".npy", "numpy.save", no_space), (".tif", "PIL.Image.Image.save", no_space)])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, ending, target, fault):
    volume = scan(np.float32)
    path = write(tmp_path / f"a{ending}", volume)
    before = path.read_bytes()
    monkeypatch.setattr(target, fault)
    for name, words in ((path, "existing file was kept"), (tmp_path / f"b{ending}", "nothing was left behind")):
        with pytest.raises(WriteError, match=words):
            write(name, volume)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


LIMITED = """
import resource, sys
import numpy as np
from medmatting.checks import WriteError
from medmatting.files import write
from medmatting.volumes import Volume
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
noise = np.random.default_rng(0).random((1, 200, 200), np.float32)
for ending in (".nii", ".nii.gz", ".nrrd", ".mha", ".npy", ".npz", ".tif", ".png"):
    try:
        write(sys.argv[1] + "/a" + ending, noise[0] if ending == ".png" else Volume(noise))
    except WriteError as error:
        print(ending, "refused")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the file size")
def test_every_writer_notices_a_disk_that_takes_no_more(tmp_path):
    # The operating system itself cuts every file at 20 kB: the same fault as a full disk, without needing one.
    run = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [w for e in (".nii", ".nii.gz", ".nrrd", ".mha", ".npy", ".npz", ".tif", ".png")
                                  for w in (e, "refused")]
    assert not list(tmp_path.iterdir()) and run.stderr == ""


@pytest.mark.parametrize("ending", [*VOLUMES, ".npz", ".npy", ".tif", ".png"])
@pytest.mark.parametrize("dtype", [">u2", ">f4"])
def test_big_endian_arrays_keep_their_values(tmp_path, ending, dtype):
    array = np.array([[0, 0.25, 1]] if dtype == ">f4" else [[0, 258, 65535]], dtype)
    array = array if ending in (".tif", ".png", ".npy") else array[None]
    back = read(write(tmp_path / f"a{ending}", array if ending == ".npy" else Volume(array)))
    truth = np.round(array * 255.0) if dtype == ">f4" and ending == ".png" else array
    assert np.array_equal(back.array, truth) and back.array.dtype.isnative


def test_numbers_longer_than_64_bits_are_refused(tmp_path):
    for ending in [*VOLUMES, ".npz", ".npy", ".tif", ".png"]:
        with pytest.raises(InputError, match="volume: got a (longdouble|float128)"):
            write(tmp_path / f"a{ending}", Volume(np.ones((3, 4), np.longdouble)))


def test_half_precision_matte_in_sixteen_bits(tmp_path):
    matte = np.array([[0, 0.5, 1]], np.float16)
    assert np.array_equal(read(write(tmp_path / "a.png", matte, bits=16)).array, [[0, 32768, 65535]])


@pytest.mark.parametrize("volume, words", [
    (Volume(np.zeros((2, 1, 32768), np.uint8)), "32767"), (Volume(np.zeros((2, 2), np.uint8), unit="µg"), "ASCII"),
    (Volume(np.zeros((2, 2), np.uint8), unit="x" * 76), "75 characters")])
def test_what_nifti_cannot_hold_is_refused(tmp_path, volume, words):
    with pytest.raises(InputError, match=words):
        write(tmp_path / "a.nii.gz", volume)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", [
    dict(origin="here"), dict(origin=5.0), dict(origin=[1, 2]), dict(direction=1.0), dict(direction=["a", "b"]), dict(unit=7),
    dict(unit=["HU"]), dict(spacing="wide"), dict(spacing=[[1, 2, 3]]), dict(channels=[1, 2]), dict(channels="yes")])
def test_bad_npz_entries_are_refused(tmp_path, entry):
    np.savez(tmp_path / "a.npz", array=np.zeros((5, 6, 7)), **entry)
    with pytest.raises(InputError, match=f"a.npz.*{next(iter(entry))}"):
        read(tmp_path / "a.npz")


def test_names_that_lead_nowhere_are_refused(tmp_path, monkeypatch):
    for name in (None, 3, "a\0b.nii", "x" * 5000 + ".nii"):
        with pytest.raises(InputError, match="path"):
            read(name)

    def locked(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.stat", locked)
    with pytest.raises(InputError, match="Permission denied"):
        read(tmp_path / "a.nii")


def test_an_existing_file_keeps_its_mode_and_its_link(tmp_path):
    path = write(tmp_path / "a.nii.gz", scan())
    path.chmod(0o640)
    link = tmp_path / "link.nii.gz"
    link.symlink_to(path)
    write(link, Volume(np.ones((2, 3), np.uint8)))
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert read(path).shape == (2, 3) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("spacing", [np.array(1.0), 1j, object(), (1j, 1, 1), np.ones((3, 1))])
def test_odd_spacing_is_refused(spacing):
    with pytest.raises(InputError, match="spacing"):
        check_spacing(spacing, 3)


@pytest.mark.parametrize("ending", [".tif", ".nii.gz", ".nrrd", ".mha", ".npz"])
def test_one_slice_stays_a_volume(tmp_path, ending):
    image = Volume(np.arange(20, dtype=np.uint8).reshape(1, 4, 5))
    back = read(write(tmp_path / f"a{ending}", image))
    assert back.shape == (1, 4, 5) and not back.channels and (back.array == image.array).all()


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".npz"])
@pytest.mark.parametrize("shape", [(4, 5, 1), (3, 4, 5, 1)])
def test_one_channel_stays_a_channel(tmp_path, ending, shape):
    image = Volume(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), channels=True, unit="HU")
    back = read(write(tmp_path / f"a{ending}", image))
    assert back.array.shape == shape and back.channels and back.unit == "HU" and (back.array == image.array).all()


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write("~/new/a.npz", np.zeros((2, 3))) == tmp_path / "new" / "a.npz"
    assert read("~/new/a.npz").shape == (2, 3)
