"""DICOM series written here with pydicom, read back, and compared with SimpleITK's series reader."""

import os

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from miniature_dicom import TURN, dataset, enhanced, save, series
from pydicom.uid import PositronEmissionTomographyImageStorage, RLELossless

from medmatting.checks import InputError
from medmatting.dicom import read_dicom
from medmatting.files import read
from medmatting.volumes import positions

def by_itk(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.mark.parametrize("axes", [np.eye(3), TURN, np.diag([-1, -1, 1]), np.eye(3)[[2, 0, 1]]])
def test_values_and_geometry_agree_with_simpleitk(tmp_path, axes):
    stored = series(tmp_path, axes=axes)
    ct, itk = read_dicom(tmp_path), by_itk(tmp_path)
    assert np.array_equal(ct.array, stored - 1024) and ct.array.dtype == np.int16 and ct.unit == "HU"
    assert np.array_equal(ct.array, sitk.GetArrayFromImage(itk))
    for index in [(0, 0, 0), (5, 4, 5), (2, 1, 3)]:
        assert np.allclose(positions(ct, index), itk.TransformIndexToPhysicalPoint(index[::-1]), atol=1e-4)


def test_read_of_a_folder_is_the_same(tmp_path):
    stored = series(tmp_path)
    assert np.array_equal(read(tmp_path).array, stored - 1024)


def test_falling_instance_numbers_and_falling_positions(tmp_path):
    # Row and column swapped: the normal points to the feet, and slices must still rise along it.
    axes = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1.0]])
    stored = series(tmp_path, axes=axes)
    ct = read_dicom(tmp_path)
    assert np.array_equal(ct.array, stored - 1024)
    assert np.allclose(ct.direction[:, 0], [0, 0, -1]) and np.allclose(positions(ct, (1, 0, 0)), [-20, -30, 4.5])


def test_signed_unsigned_and_twelve_bits(tmp_path):
    stored = series(tmp_path / "u", signed=False, bits=12)
    assert np.array_equal(read_dicom(tmp_path / "u").array, stored - 1024)
    low = np.full((5, 6), -2000)
    save(dataset(low, (0, 0, 0), intercept=0), tmp_path / "s" / "1.dcm")
    assert (read_dicom(tmp_path / "s").array == -2000).all()


def test_large_or_fractional_values_become_float32(tmp_path):
    big = np.full((5, 6), 60000)
    save(dataset(big, (0, 0, 0), signed=False), tmp_path / "1.dcm")
    volume = read_dicom(tmp_path)
    assert volume.array.dtype == np.float32 and (volume.array == 58976).all()


def test_each_slice_has_its_own_slope(tmp_path):
    stored = np.random.default_rng(0).integers(0, 30000, (4, 5, 6))
    for k in range(4):
        ds = dataset(stored[k], (0, 0, 3.0 * k), slope=0.25 * (k + 1), intercept=0, Modality="PT", Units="BQML",
                     SOPClassUID=PositronEmissionTomographyImageStorage)
        save(ds, tmp_path / f"{k}.dcm")
    pet = read_dicom(tmp_path)
    assert np.allclose(pet.array, stored * (0.25 * np.arange(1, 5))[:, None, None])
    assert pet.unit == "" and pet.meta["units"] == "BQML"


def test_two_series_are_named_and_can_be_chosen(tmp_path):
    series(tmp_path, uid="1.2.10", prefix="a")
    soft = series(tmp_path, n=4, uid="1.2.20", seed=5, prefix="b")
    with pytest.raises(InputError) as refusal:
        read_dicom(tmp_path)
    assert all(text in str(refusal.value) for text in ("1.2.10 (6 slices)", "1.2.20 (4 slices)", "series='1.2.10'"))
    assert np.array_equal(read(tmp_path, series="1.2.20").array, soft - 1024)
    with pytest.raises(InputError, match="series: got '9.9'"):
        read_dicom(tmp_path, series="9.9")


def test_missing_slice_is_located(tmp_path):
    series(tmp_path, skip=(3,))
    with pytest.raises(InputError, match=r"5\.00 mm between the slices at 12\.00 and 17\.00 mm \(slices numbered 4 and 2\)"):
        read_dicom(tmp_path)


def test_duplicate_position_is_located(tmp_path):
    series(tmp_path)
    series(tmp_path / "again", seed=3, skip=(0, 1, 3, 4, 5))
    with pytest.raises(InputError, match=r"1 slices at the place of another.* at 12\.00 and 12\.00 mm"):
        read_dicom(tmp_path)


def test_rounded_positions_are_even_enough(tmp_path):
    for k, z in enumerate([0.0, 2.5, 5.01, 7.49, 10.0]):
        save(dataset(np.full((5, 6), k), (0, 0, z)), tmp_path / f"{k}.dcm")
    assert read_dicom(tmp_path).spacing == (2.5, 0.7, 0.8)


def test_gantry_tilt_is_refused(tmp_path):
    for k in range(6):
        save(dataset(np.zeros((5, 6)), (0, 2.5 * k * np.tan(np.radians(15)), 2.5 * k)), tmp_path / f"{k}.dcm")
    with pytest.raises(InputError, match="tilt of about 15 degrees"):
        read_dicom(tmp_path)


@pytest.mark.parametrize("odd, words", [
    (dict(axes=TURN), "orientation"), (dict(PixelSpacing=[0.7, 0.81]), "spacing"), (dict(stored=np.zeros((5, 7))), "shape")])
def test_slices_that_differ_are_refused(tmp_path, odd, words):
    series(tmp_path)
    stored = odd.pop("stored", np.zeros((5, 6)))
    save(dataset(stored, (-20, -30, 22), **odd), tmp_path / "odd.dcm")
    with pytest.raises(InputError, match=f"different {words}.*odd.dcm"):
        read_dicom(tmp_path)


def test_scouts_reports_and_strays_are_skipped_and_counted(tmp_path):
    stored = series(tmp_path)
    save(dataset(np.zeros((5, 6)), (0, 0, 0), np.eye(3)[[2, 0, 1]], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
         tmp_path / "scout.dcm")
    with pytest.raises(InputError, match="scout.dcm"):  # of the same series
        read_dicom(tmp_path)
    scout = pydicom.dcmread(tmp_path / "scout.dcm")
    scout.SeriesInstanceUID = "1.2.4"
    save(scout, tmp_path / "scout.dcm")
    report = dataset(np.zeros((5, 6)), (0, 0, 0), uid="1.2.5", SOPClassUID=pydicom.uid.BasicTextSRStorage)
    del report.ImagePositionPatient, report.PixelData
    save(report, tmp_path / "report.dcm")
    (tmp_path / "DICOMDIR").write_bytes(b"not really")
    (tmp_path / "empty").touch()
    ct = read_dicom(tmp_path)
    assert np.array_equal(ct.array, stored - 1024)
    assert ct.meta["skipped"] == {"not slices of an image": 2, "not DICOM or unreadable": 2}


def test_nothing_about_the_patient_is_kept(tmp_path):
    series(tmp_path)
    meta = read_dicom(tmp_path).meta
    assert "ecret" not in repr(meta)
    assert meta["kernel"] == "STANDARD" and meta["modality"] == "CT" and meta["slice_thickness"] == 2.5


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    stored = series(tmp_path / "inside")
    series(tmp_path / "outside", uid="1.9")
    os.symlink(tmp_path / "outside", tmp_path / "inside" / "link")
    os.symlink(tmp_path / "outside" / "000.dcm", tmp_path / "inside" / "file.dcm")
    assert np.array_equal(read_dicom(tmp_path / "inside").array, stored - 1024)


def test_folder_without_dicom(tmp_path):
    with pytest.raises(InputError, match="no files"):
        read(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="1 files not DICOM"):
        read(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_dicom(tmp_path / "nowhere")


def test_truncated_pixels_are_refused(tmp_path):
    series(tmp_path)
    path = tmp_path / "002.dcm"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="002.dcm"):
        read_dicom(tmp_path)


def test_compressed_slices_are_decoded_or_refused(tmp_path):
    stored = np.random.default_rng(0).integers(0, 2000, (5, 6))
    ds = dataset(stored, (0, 0, 0))
    ds.compress(RLELossless)
    save(ds, tmp_path / "1.dcm")
    assert np.array_equal(read_dicom(tmp_path).array[0], stored - 1024)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless  # a lie: damaged, or no decoder
    save(ds, tmp_path / "1.dcm")
    with pytest.raises(InputError, match="1.dcm, whose pixels cannot be decoded"):
        read_dicom(tmp_path)


def test_ct_without_rescale_is_refused(tmp_path):
    ds = dataset(np.zeros((5, 6)), (0, 0, 0))
    del ds.RescaleIntercept
    save(ds, tmp_path / "1.dcm")
    with pytest.raises(InputError, match="RescaleIntercept"):
        read_dicom(tmp_path)


def test_single_slice_needs_a_thickness(tmp_path):
    ds = dataset(np.zeros((5, 6)), (0, 0, 0))
    save(ds, tmp_path / "1.dcm")
    assert read(tmp_path / "1.dcm").spacing == (2.5, 0.7, 0.8)
    del ds.SliceThickness
    save(ds, tmp_path / "1.dcm")
    with pytest.raises(InputError, match="SliceThickness"):
        read_dicom(tmp_path)


def test_enhanced_multi_frame(tmp_path):
    stored = enhanced(tmp_path / "enhanced.dcm")
    ct = read(tmp_path / "enhanced.dcm")
    assert np.array_equal(ct.array, stored - 1024) and ct.unit == "HU"
    assert ct.spacing == (2.5, 0.7, 0.8) and ct.origin == (-20, -30, 0)


def test_plain_multi_frame_is_refused(tmp_path):
    stored = np.zeros((3, 5, 6))
    ds = dataset(stored[0], (0, 0, 0), NumberOfFrames=3, PixelData=stored.astype(np.int16).tobytes())
    save(ds, tmp_path / "1.dcm")
    with pytest.raises(InputError, match="multi-frame"):
        read_dicom(tmp_path)


def damaged(path, ds, damage):
    "Damage the file of one slice, or take its place in the patient away."
    data = path.read_bytes()
    if damage == "no position":
        del ds.ImagePositionPatient
        save(ds, path)
    else:
        place = data.index(b"\x20\x00\x0e\x00")  # the tag of SeriesInstanceUID
        path.write_bytes({"empty": b"", "overwritten": b"\xff" * len(data), "cut header": data[: place + 10],
                          "cut early": data[:150], "cut position": data[: data.index(b"\x20\x00\x32\x00") + 12]}[damage])


DAMAGE = ["empty", "overwritten", "cut header", "cut early", "cut position", "no position"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("ending", [".dcm", "", ".1"])
def test_a_lost_end_slice_is_refused(tmp_path, damage, ending):
    # At an end of the series a missing slice leaves no gap, so the file itself has to be noticed.
    for k in range(5):
        ds = dataset(np.full((5, 6), k), (0, 0, 2.5 * k))
        save(ds, tmp_path / f"slice{k}{ending}")
    assert read_dicom(tmp_path).shape == (5, 5, 6)
    damaged(tmp_path / f"slice4{ending}", ds, damage)
    with pytest.raises(InputError, match=f"1 DICOM file that .*slice4{ending}.*remove or restore"):
        read_dicom(tmp_path)


def test_locked_files_and_folders_are_refused(tmp_path, monkeypatch):
    series(tmp_path)
    locked, plain = tmp_path / "000.dcm", open

    def no_entry(name, *args, **kwargs):
        if str(name) == str(locked):
            raise PermissionError(13, "Permission denied", str(name))
        return plain(name, *args, **kwargs)

    monkeypatch.setattr("builtins.open", no_entry)
    with pytest.raises(InputError, match="000.dcm"):
        read_dicom(tmp_path)
    locked, scandir = tmp_path / "inner", os.scandir
    locked.mkdir()

    def no_listing(name):
        if str(name) == str(locked):
            raise PermissionError(13, "Permission denied", str(name))
        return scandir(name)

    monkeypatch.setattr("os.scandir", no_listing)
    with pytest.raises(InputError, match="inner, which cannot be opened"):
        read_dicom(tmp_path)


@pytest.mark.parametrize("tag, text", [
    ("ImagePositionPatient", r"0\0"), ("ImagePositionPatient", r"0\0\nan"), ("PixelSpacing", "0.7"),
    ("PixelSpacing", r"0.7\-0.7"), ("PixelSpacing", r"0.7\abc"), ("RescaleSlope", "nan"), ("RescaleSlope", "0"),
    ("RescaleIntercept", "inf"), ("SliceThickness", "thin"), ("ImageOrientationPatient", r"1\0\0")])
def test_bad_header_numbers_are_refused_by_tag(tmp_path, tag, text):
    series(tmp_path)
    ds = pydicom.dcmread(tmp_path / "002.dcm")
    number = pydicom.datadict.tag_for_keyword(tag)
    ds[number] = pydicom.dataelem.RawDataElement(pydicom.tag.Tag(number), "DS", len(text), text.encode(), 0, False, True)
    ds.save_as(tmp_path / "002.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match=f"002.dcm with {tag} ") as refusal:
        read_dicom(tmp_path)
    assert "\n" not in str(refusal.value)


def test_mixed_modality_is_refused(tmp_path):
    series(tmp_path)
    save(dataset(np.zeros((5, 6)), (-20, -30, 22), Modality="PT"), tmp_path / "odd.dcm")
    with pytest.raises(InputError, match="Modality CT and PT"):
        read_dicom(tmp_path)
