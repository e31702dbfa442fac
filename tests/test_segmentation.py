"""DICOM segmentations written from mattes: read back here, by highdicom and by pydicom, beside the headers of the source."""

import highdicom
import numpy as np
import pydicom
import pytest
from miniature_dicom import TURN, enhanced, save, series

from medmatting.checks import InputError, WriteError
from medmatting.dicom import read_dicom
from medmatting.files import read, write
from medmatting.segmentation import SEGMENTS, read_segmentation, write_segmentation
from medmatting.volumes import Volume, crop, paste

HALF_STEP = 1 / 510 + 1e-6


def matte(ct, first=2, last=4, seed=0):
    "Alpha on the grid of the CT, zero outside the slices [first, last)."
    alpha = np.zeros(ct.shape, np.float32)
    alpha[first:last] = np.random.default_rng(seed).random((last - first, *ct.shape[1:]))
    return ct.with_array(alpha, unit="", meta={})


def same_place(a, b):
    return a.shape == b.shape and np.allclose(a.spacing, b.spacing, rtol=1e-9) and np.allclose(a.origin, b.origin, atol=1e-9) \
        and np.allclose(a.direction, b.direction, atol=1e-9)


@pytest.mark.parametrize("axes", [np.eye(3), TURN, np.diag([-1, -1, 1]), np.eye(3)[[2, 0, 1]], np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1.0]])])
@pytest.mark.parametrize("first, last", [(2, 4), (0, 6), (3, 3)])
def test_a_matte_reads_back_on_the_grid_of_its_ct(tmp_path, axes, first, last):
    series(tmp_path / "ct", axes=axes)
    ct = read(tmp_path / "ct")
    alpha = matte(ct, first, last)
    back = read(write(tmp_path / "alpha.dcm", alpha, like=ct))
    assert same_place(back, ct) and back.array.dtype == np.float32
    assert abs(back.array - alpha.array).max() <= HALF_STEP


def test_highdicom_reads_the_same_matte_at_the_same_place(tmp_path):
    series(tmp_path / "ct", axes=TURN)
    ct = read(tmp_path / "ct")
    alpha = matte(ct, 2, 4)
    theirs = highdicom.seg.segread(write(tmp_path / "alpha.dcm", alpha, like=ct)).get_volume(combine_segments=False, allow_missing_positions=True)
    array = np.squeeze(theirs.array, -1)
    # Their affine maps index (slice, row, column) to patient mm, and may run along the slices the other way.
    ours = np.eye(4)
    ours[:3, :3], ours[:3, 3] = ct.direction * ct.spacing, ct.origin
    if theirs.direction[:, 0] @ ct.direction[:, 0] < 0:
        theirs = theirs[::-1]
        array = np.squeeze(theirs.array, -1)
    assert np.allclose(theirs.affine, ours, atol=1e-6)
    assert abs(array - alpha.array).max() <= HALF_STEP


def test_geometry_and_references_are_those_of_the_source(tmp_path):
    series(tmp_path / "ct", axes=TURN)
    ct = read(tmp_path / "ct")
    seg = pydicom.dcmread(write(tmp_path / "alpha.dcm", matte(ct, 2, 4), like=ct, segment="lung nodule"))
    by_instance = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, (tmp_path / "ct").iterdir())}
    source = by_instance[ct.meta["instances"][0]]
    shared = seg.SharedFunctionalGroupsSequence[0]
    assert (seg.SegmentationType, seg.SegmentationFractionalType, seg.MaximumFractionalValue, seg.BitsStored) == ("FRACTIONAL", "OCCUPANCY", 255, 8)
    assert shared.PixelMeasuresSequence[0].PixelSpacing == source.PixelSpacing
    assert abs(shared.PixelMeasuresSequence[0].SpacingBetweenSlices - ct.spacing[0]) < 1e-9
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == source.ImageOrientationPatient
    assert seg.FrameOfReferenceUID == source.FrameOfReferenceUID and seg.StudyInstanceUID == source.StudyInstanceUID
    assert (seg.PatientID, seg.PatientName) == (source.PatientID, source.PatientName) and seg.Modality == "SEG"
    assert {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence} == set(by_instance)
    assert len(seg.PerFrameFunctionalGroupsSequence) == 4  # slices 0, 2, 3, 5: those with alpha and both ends
    named = [frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID for frame in seg.PerFrameFunctionalGroupsSequence]
    assert set(named) == {ct.meta["instances"][k] for k in (0, 2, 3, 5)}
    for frame, named in zip(seg.PerFrameFunctionalGroupsSequence, named):
        assert frame.PlanePositionSequence[0].ImagePositionPatient == by_instance[named].ImagePositionPatient


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_are_named_by_codes(tmp_path, name):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")
    item = pydicom.dcmread(write(tmp_path / "alpha.dcm", matte(ct), like=ct, segment=name)).SegmentSequence[0]
    codes = {"tissue": "85756007", "lung nodule": "27925004", "nodule": "27925004", "lesion": "52988006"}
    assert item.SegmentedPropertyTypeCodeSequence[0].CodeValue == codes[name] and item.SegmentLabel.startswith(name)
    assert item.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "SCT"
    assert ("AnatomicRegionSequence" in item) == (name == "lung nodule")


def test_quantisation_is_at_most_half_a_step(tmp_path):
    series(tmp_path / "ct", n=35)
    ct = read(tmp_path / "ct")
    steps = np.arange(256) / 255
    values = np.concatenate([steps, steps[:-1] + 1 / 510, steps[1:] - 1e-6, np.random.default_rng(0).random(284)])
    alpha = ct.with_array(values.reshape(ct.shape).astype(np.float32), unit="", meta={})
    back = read(write(tmp_path / "alpha.dcm", alpha, like=ct))
    assert abs(back.array - alpha.array).max() <= HALF_STEP
    assert np.array_equal(back.array.ravel()[:256], steps.astype(np.float32))  # what was rounded once stays


def test_a_matte_of_a_crop_is_put_at_its_place(tmp_path):
    series(tmp_path / "ct", axes=TURN)
    ct = read(tmp_path / "ct")
    part = crop(ct, (slice(1, 4), slice(1, 4), slice(2, 6)))
    alpha = matte(part, 0, 3)
    back = read(write(tmp_path / "alpha.dcm", np.asarray(alpha), like=part))
    assert same_place(back, ct) and abs(back.array - paste(alpha, ct).array).max() <= HALF_STEP


def test_a_bool_mask_and_a_matte_that_remembers_its_series(tmp_path):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")
    mask = matte(ct).array > 0.5
    assert np.array_equal(read(write(tmp_path / "alpha.dcm", ct.with_array(mask))).array, mask.astype(np.float32))


def test_a_segmentation_beside_its_ct_is_no_slice_of_it(tmp_path):
    stored = series(tmp_path)
    ct = read(tmp_path)
    write(tmp_path / "alpha.dcm", matte(ct), like=ct)
    again = read(tmp_path)
    assert np.array_equal(again.array, stored - 1024) and again.meta["skipped"] == {"not slices of an image": 1}
    write(tmp_path / "alpha.dcm", matte(ct, 1, 5), like=again)  # and it can be written again


def test_an_enhanced_source(tmp_path):
    enhanced(tmp_path / "enhanced.dcm")
    ct = read(tmp_path / "enhanced.dcm")
    alpha = matte(ct, 1, 2)
    back = read(write(tmp_path / "alpha.dcm", alpha, like=ct))
    assert same_place(back, ct) and abs(back.array - alpha.array).max() <= HALF_STEP


def by_highdicom(folder, kind, array, segments=1, **options):
    "A segmentation written by highdicom itself, empty frames left out at the ends too."
    sources = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda ds: ds.ImagePositionPatient[2])
    for ds in sources:
        for name in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            setattr(ds, name, None)
    code = pydicom.sr.codedict.codes.SCT.Tissue
    described = [highdicom.seg.SegmentDescription(k + 1, f"part {k + 1}", code, code, "MANUAL") for k in range(segments)]
    seg = highdicom.seg.Segmentation(sources, array, kind, described, highdicom.UID(), 1, highdicom.UID(), 1, "x", "x", "x", "x", **options)
    seg.save_as(folder.parent / "theirs.dcm")
    return folder.parent / "theirs.dcm"


def test_files_of_others_with_empty_ends_give_the_part_they_hold(tmp_path):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")
    alpha = matte(ct, 1, 4)
    alpha.array[2] = 0  # a hole between two frames
    path = by_highdicom(tmp_path / "ct", "FRACTIONAL", alpha.array, max_fractional_value=100)
    back = read(path)
    assert back.shape == (3, 5, 6) and np.allclose(back.origin, (-20, -30, 9.5)) and not back.array[1].any()
    assert abs(paste(back, ct).array - alpha.array).max() <= 1 / 200 + 1e-6


def test_binary_and_several_segments(tmp_path):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")
    masks = np.random.default_rng(0).random((*ct.shape, 2)) > 0.5
    path = by_highdicom(tmp_path / "ct", "BINARY", masks.astype(np.uint8), segments=2)
    with pytest.raises(InputError, match=r"segment: got None, but accepted is one of 1 \(part 1\), 2 \(part 2\)"):
        read(path)
    second = read_segmentation(path, segment=2)
    assert same_place(second, ct) and np.array_equal(second.array, masks[..., 1].astype(np.float32)) and second.meta["segment"] == "part 2"
    assert second.meta["source_series"] == ct.meta["series_uid"]


def test_compressed_segmentations_are_read(tmp_path):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")
    alpha = ct.with_array(np.broadcast_to(np.float32(0.4), ct.shape))
    for syntax in (pydicom.uid.RLELossless, pydicom.uid.JPEGLSLossless):
        back = read(by_highdicom(tmp_path / "ct", "FRACTIONAL", alpha.array, transfer_syntax_uid=syntax))
        assert abs(back.array - alpha.array).max() <= HALF_STEP


@pytest.mark.parametrize("values, words", [
    (np.full((6, 5, 6), 1.5, np.float32), "values in .0, 1."), (np.full((6, 5, 6), np.nan, np.float32), "NaN"),
    (np.ones((6, 5, 6), np.uint8), "floats in"), (np.ones((6, 5, 7), np.float32), "of the shape"), (np.ones((5, 6), np.float32), "of the shape")])
def test_what_is_no_matte_is_refused(tmp_path, values, words):
    series(tmp_path / "ct")
    with pytest.raises(InputError, match=words):
        write(tmp_path / "alpha.dcm", values, like=read(tmp_path / "ct"))
    assert not (tmp_path / "alpha.dcm").exists()


def test_a_matte_without_a_series_is_refused_by_argument(tmp_path):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")
    with pytest.raises(InputError, match="like: got None"):
        write(tmp_path / "alpha.dcm", matte(ct).array)
    for like in (None, Volume(ct.array, ct.spacing)):
        with pytest.raises(InputError, match=r"like: .*not read from DICOM.* mm.read\(folder\)"):
            write(tmp_path / "alpha.dcm", Volume(np.zeros(ct.shape, np.float32), ct.spacing), like)
    with pytest.raises(InputError, match="segment: got 'spleen'"):
        write(tmp_path / "alpha.dcm", matte(ct), like=ct, segment="spleen")
    with pytest.raises(InputError, match="resample_like"):
        write_segmentation(tmp_path / "alpha.dcm", Volume(np.zeros(ct.shape, np.float32), (2.5, 0.7, 0.8)), ct)


def test_a_source_that_changed_or_cannot_be_referred_to_is_refused(tmp_path):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")
    (tmp_path / "ct" / "000.dcm").rename(tmp_path / "000.dcm")
    with pytest.raises(InputError):
        write(tmp_path / "alpha.dcm", matte(ct), like=ct)
    (tmp_path / "000.dcm").rename(tmp_path / "ct" / "000.dcm")
    other = pydicom.dcmread(tmp_path / "ct" / "001.dcm")
    other.SOPInstanceUID = "1.2.3.4"
    save(other, tmp_path / "ct" / "001.dcm")
    with pytest.raises(InputError, match="have changed"):
        write(tmp_path / "alpha.dcm", matte(ct), like=ct)
    other.SOPInstanceUID = pydicom.dcmread(tmp_path / "ct" / "002.dcm").SOPInstanceUID
    save(other, tmp_path / "ct" / "001.dcm")
    with pytest.raises(InputError, match="share a SOPInstanceUID"):
        write(tmp_path / "alpha.dcm", matte(ct), like=read(tmp_path / "ct"))
    del other.FrameOfReferenceUID
    other.SOPInstanceUID = "1.2.3.4"
    save(other, tmp_path / "ct" / "001.dcm")
    with pytest.raises(InputError, match="001.dcm without FrameOfReferenceUID"):
        write(tmp_path / "alpha.dcm", matte(ct), like=read(tmp_path / "ct"))
    assert not (tmp_path / "alpha.dcm").exists()


def test_patients_are_not_named_in_warnings_and_broken_headers_are_refused(tmp_path, recwarn):
    series(tmp_path / "ct", PatientName="LIDC-IDRI-0001", PatientID="LIDC-IDRI-0001")
    ct = read(tmp_path / "ct")
    assert pydicom.dcmread(write(tmp_path / "alpha.dcm", matte(ct), like=ct)).PatientName == "LIDC-IDRI-0001" and not list(recwarn)
    for path in (tmp_path / "ct").iterdir():
        change(path, PatientSex="X")
    with pytest.raises(InputError, match="like: got a series whose headers break a rule of DICOM .*X"):
        write(tmp_path / "alpha.dcm", matte(ct), like=ct)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")

    def full(self, name, *args, **kwargs):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pydicom.Dataset, "save_as", full)
    with pytest.raises(WriteError, match="No space left"):
        write(tmp_path / "alpha.dcm", matte(ct), like=ct)
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]


def change(path, **values):
    ds = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(ds, name, value)
    ds.save_as(path)


def test_damaged_segmentations_are_refused(tmp_path):
    series(tmp_path / "ct")
    ct = read(tmp_path / "ct")
    path = write(tmp_path / "alpha.dcm", matte(ct, 0, 6), like=ct)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(InputError, match="alpha.dcm, whose pixels cannot be decoded"):
        read(path)
    path.write_bytes(whole)
    change(path, SegmentationType="LABELMAP")
    with pytest.raises(InputError, match="type LABELMAP"):
        read(path)
    path.write_bytes(whole)
    ds = pydicom.dcmread(path)
    ds.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence[0].ImagePositionPatient[2] += 1
    ds.save_as(path)
    with pytest.raises(InputError, match="do not lie on one grid of 2.5 mm"):
        read(path)


def test_read_dicom_knows_where_a_series_came_from(tmp_path):
    series(tmp_path, n=4)
    meta = read_dicom(tmp_path).meta
    named = {pydicom.dcmread(path).SOPInstanceUID: float(pydicom.dcmread(path).ImagePositionPatient[2]) for path in tmp_path.iterdir()}
    assert [named[uid] for uid in meta["instances"]] == [7.0, 9.5, 12.0, 14.5] and meta["folder"] == str(tmp_path.resolve())


def test_the_command_line_writes_segmentations(tmp_path, capsys):
    from medmatting.cli import main

    series(tmp_path / "ct", n=8)
    ct = read(tmp_path / "ct")
    trimap = np.zeros(ct.shape, np.uint8)
    trimap[2:6, 1:4, 1:5], trimap[3:5, 2:3, 2:4] = 128, 255
    write(tmp_path / "trimap.nii.gz", trimap, like=ct)
    write(tmp_path / "ct.nii.gz", ct)
    words = ["--trimap", str(tmp_path / "trimap.nii.gz"), "--hu-range", "-1024", "976"]
    alpha = tmp_path / "alpha.dcm"
    assert main(["matte", str(tmp_path / "ct"), *words, "-o", str(alpha), "--segment", "lung nodule"]) == 0
    assert main(["matte", str(tmp_path / "ct"), *words, "-o", str(tmp_path / "alpha.nii.gz")]) == 0
    back = read(alpha)
    assert same_place(back, ct) and back.meta["segment"] == "lung nodule, alpha matte"
    assert abs(back.array - read(tmp_path / "alpha.nii.gz").array).max() <= HALF_STEP
    capsys.readouterr()
    assert main(["matte", str(tmp_path / "ct.nii.gz"), *words, "-o", str(tmp_path / "b.dcm")]) == 2
    assert "not read from DICOM" in capsys.readouterr().err
    assert main(["matte", str(tmp_path / "ct"), *words, "-o", str(tmp_path / "b.dcm"), "--segment", "spleen"]) == 2
    assert "segment: got 'spleen'" in capsys.readouterr().err and not (tmp_path / "b.dcm").exists()
