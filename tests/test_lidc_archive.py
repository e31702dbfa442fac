"""LIDC-IDRI in miniature: outlines drawn around the embedded masks, shipped as DICOM and XML, read, and compared voxel by voxel."""

import json
import os

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature_dicom import MARKS, Archived, roi, save, trace

from medmatting import lidc_archive
from medmatting.checks import InputError, WriteError
from medmatting.cli import main
from medmatting.dicom import read_slices
from medmatting.decisions import review_automatically
from medmatting.files import read
from medmatting.labelled_set import export_set
from medmatting.labelling import open_labelling
from medmatting.lidc import shape
from medmatting.lidc_archive import (Annotation, ArchiveSettings, Outline, annotation_mask, convert_archive, fill_outline, find_nodules,
                                     group_annotations, outline_pixels, read_annotations)
from medmatting.trimaps import trimap_from_raters
from medmatting.volume_sets import Samples, volume_set
from medmatting.volumes import Volume, crop_nodule, resample

SMALL = ArchiveSettings(size_px=24, pad_slices=1, spacing_mm=1.0)


def balls(seed=0, readers=4, radius=5.0, size=(9, 24, 24), shift=1.0):
    "Masks of readers who disagree a little about a ball."
    rng = np.random.default_rng(seed)
    grid = np.indices(size) - (np.reshape(size, (3, 1, 1, 1)) - 1) / 2
    return np.stack([np.sum((grid * np.reshape((2, 1, 1), (3, 1, 1, 1)) - rng.uniform(-shift, shift, (3, 1, 1, 1))) ** 2, 0)
                     < (radius + rng.uniform(-0.8, 0.8)) ** 2 for _ in range(readers)])


def found_in(archived):
    archived.write()
    slices, distance, _ = read_slices(archived.folder, archived.series)
    return list(find_nodules(read_annotations(archived.folder / "069.xml"), slices)), slices, distance


# ---- outlines and masks


@pytest.mark.parametrize("index", [*range(3, 897, 90), 839, 107])
def test_masks_of_real_outlines_come_back_voxel_by_voxel(index):
    masks = np.pad(shape(index).masks, ((0, 0), (0, 0), (1, 1), (1, 1)))
    names = tuple(map(str, range(masks.shape[1])))
    for mask in masks:
        outlines = tuple(Outline(str(k), 0.0, *part) for k, plane in enumerate(mask) for part in trace(plane))
        assert np.array_equal(annotation_mask(Annotation(1, "", {}, outlines), names, mask.shape[1:]), mask)


@pytest.mark.parametrize("index", [2, 40, 300])
def test_embedded_shapes_travel_through_dicom_and_xml(tmp_path, index):
    original = shape(index)
    archived = Archived(tmp_path, [original.masks], original.spacing[:2])
    [nodule], _, _ = found_in(archived)
    whole = np.zeros(archived.masks[0].shape, bool)
    whole[:, nodule.first : nodule.last] = nodule.masks
    assert np.array_equal(whole, archived.masks[0]) and not nodule.reason


def test_what_an_outline_encloses():
    square = np.array([(1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (3, 4), (4, 4), (4, 3), (4, 2), (4, 1), (3, 1), (2, 1)])
    inner = np.zeros((6, 6), bool)
    inner[2:4, 2:4] = True
    assert np.array_equal(fill_outline(Outline("", 0, True, square), (6, 6)), inner)
    whole = np.zeros((6, 6), bool)
    whole[1:5, 1:5] = True
    assert np.array_equal(fill_outline(Outline("", 0, False, square), (6, 6)), whole)
    # Only the corners given: pixels exactly on the lines between them are on the outline all the same.
    corners = square[[0, 3, 6, 9]]
    assert {tuple(p) for p in outline_pixels(corners)} == {tuple(p) for p in square}
    assert np.array_equal(fill_outline(Outline("", 0, True, corners), (6, 6)), inner)
    for few in (square[:1], square[:2]):
        assert not fill_outline(Outline("", 0, True, few), (6, 6)).any()


def test_a_hole_is_taken_away_with_its_outline():
    mask = np.zeros((12, 12), bool)
    mask[2:10, 2:10] = True
    mask[4:7, 4:7] = False
    parts = trace(mask)
    assert sorted(inclusion for inclusion, _ in parts) == [False, True]
    outlines = tuple(Outline("a", 0.0, *part) for part in parts)
    assert np.array_equal(annotation_mask(Annotation(1, "", {}, outlines), ("a",), mask.shape)[0], mask)


# ---- the XML file

REAL = """<?xml version="1.0" encoding="UTF-8"?>
<LidcReadMessage uid="1.3.6" xmlns="http://www.nih.gov" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation="http://www.nih.gov  x.xsd">
<ResponseHeader><Version>1.8.1</Version><SeriesInstanceUid>1.2.3</SeriesInstanceUid><StudyInstanceUID>1.2</StudyInstanceUID></ResponseHeader>
<readingSession><annotationVersion>3.12</annotationVersion><servicingRadiologistID>-360930790</servicingRadiologistID>
<unblindedReadNodule><noduleID>Nodule 001</noduleID><roi><imageZposition>-100.750000 </imageZposition><imageSOP_UID>1.9</imageSOP_UID>
<inclusion>TRUE</inclusion><edgeMap><xCoord>103</xCoord><yCoord>271</yCoord></edgeMap></roi></unblindedReadNodule>
<nonNodule><nonNoduleID>_Non-nodule 001</nonNoduleID><imageZposition>-100.75</imageZposition><imageSOP_UID>1.9</imageSOP_UID>
<locus><xCoord>347</xCoord><yCoord>362</yCoord></locus></nonNodule></readingSession>
<readingSession><unblindedReadNodule><noduleID>MI014_11691</noduleID><characteristics><subtlety>2</subtlety><malignancy>5</malignancy></characteristics>
<roi><imageZposition>-87.0</imageZposition><imageSOP_UID>1.10</imageSOP_UID><inclusion>FALSE</inclusion>
<edgeMap><xCoord>343</xCoord><yCoord>363</yCoord></edgeMap><edgeMap><xCoord>344</xCoord><yCoord>362</yCoord></edgeMap></roi></unblindedReadNodule></readingSession>
</LidcReadMessage>"""


def test_the_archives_own_form_is_read(tmp_path):
    (tmp_path / "a.xml").write_text(REAL, encoding="utf-8")
    readings = read_annotations(tmp_path / "a.xml")
    assert (readings.series, readings.sessions, readings.small, readings.others) == ("1.2.3", 2, 1, 1)
    [annotation] = readings.annotations
    assert (annotation.reader, annotation.name, annotation.ratings) == (2, "MI014_11691", {"subtlety": 2, "malignancy": 5})
    [outline] = annotation.outlines
    assert (outline.instance, outline.z_mm, outline.inclusion, outline.points.tolist()) == ("1.10", -87.0, False, [[363, 343], [362, 344]])


@pytest.mark.parametrize("old, new, words", [
    ("</LidcReadMessage>", "", "not well-formed"), ("<xCoord>343</xCoord>", "", "without xCoord"), ("343", "three", "xCoord three"),
    ("-87.0", "nan", "imageZposition nan"), ("FALSE", "MAYBE", "inclusion MAYBE"), ("1.2.3<", "<", "SeriesInstanceUid"),
    ("LidcReadMessage", "IdriReadMessage", "root IdriReadMessage"), ("<malignancy>5", "<malignancy>high", "malignancy high"),
    ("<LidcReadMessage", '<!DOCTYPE LidcReadMessage [<!ENTITY a "b">]><LidcReadMessage', "DOCTYPE"),
    ("<LidcReadMessage", '<!DOCTYPE LidcReadMessage SYSTEM "file:///etc/passwd"><LidcReadMessage', "DOCTYPE"), ("MI014", "&a;", "well-formed"),
    ('encoding="UTF-8"', 'encoding="no-such"', "well-formed")])
def test_bad_xml_is_refused_by_name(tmp_path, old, new, words):
    text = REAL.replace(old, new)
    assert text != REAL
    (tmp_path / "a.xml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"xml: got a.xml.*{words}"):
        read_annotations(tmp_path / "a.xml")


def test_a_document_type_is_refused_in_any_encoding_and_a_huge_file_unread(tmp_path, monkeypatch):
    laughs = REAL.replace("<LidcReadMessage", '<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><LidcReadMessage', 1).replace("UTF-8", "UTF-16")
    (tmp_path / "a.xml").write_bytes(laughs.encode("utf-16"))
    with pytest.raises(InputError, match="DOCTYPE"):
        read_annotations(tmp_path / "a.xml")
    monkeypatch.setattr(lidc_archive, "MAX_XML", 100)
    with pytest.raises(InputError, match="at most 100"):
        read_annotations(tmp_path / "a.xml")


# ---- four sessions, one nodule


def blob(z, y, x):
    "Points of a small annotation around a place in mm."
    return np.array([(z, y, x), (z, y + 1, x), (z, y, x + 1)], float)


def test_annotations_within_the_tolerance_are_one_nodule():
    points = [blob(0, 0, 0), blob(0, 0, 3), blob(0, 0, 6), blob(0, 20, 0), blob(-9, 0, 0)]
    assert group_annotations(points, [1, 2, 3, 1, 1], 2.0) == [[4], [0, 1, 2], [3]]  # linked through the one between; along z
    assert group_annotations(points, [1, 2, 3, 1, 1], 1.9) == [[4], [0], [1], [2], [3]]
    assert group_annotations([], [], 2.0) == []


def test_a_reader_who_comes_twice_splits_that_group_alone():
    near = [blob(0, 0, 0), blob(0, 0, 0.2), blob(0, 0, 2.9), blob(0, 0, 3.1)]  # two nodules 1.7 mm apart, readers 1 and 2 on each
    far = [blob(50, 0, 0), blob(50, 0, 2.95)]  # one nodule, 1.95 mm apart, which the tolerance of the others would split
    groups = group_annotations(near + far, [1, 2, 1, 2, 1, 2], 2.0)
    assert groups == [[0, 1], [2, 3], [4, 5]]


def test_what_distance_cannot_split_stays_ambiguous(tmp_path):
    bridge = np.concatenate([blob(0, 0, x) for x in range(6)])
    assert group_annotations([blob(0, 0, 0), blob(0, 0, 5), bridge], [1, 1, 2], 2.0) == [[0, 1, 2]]
    archived = Archived(tmp_path, [balls()])
    archived.rois[0] = archived.rois[0] * 2  # the same outlines twice
    nodules, _, _ = found_in(archived)
    assert any(n.reason.startswith("ambiguous: readers [1, 1") for n in nodules) and all(n.reason for n in nodules)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=10), st.randoms())
def test_grouping_is_a_partition_that_knows_no_order(items, random):
    points, readers = [blob(2.0 * z, 0, 2.0 * x) for z, x, _ in items], [r for *_, r in items]
    groups = group_annotations(points, readers, 2.0)
    assert sorted(sum(groups, [])) == list(range(len(items)))
    order = list(range(len(items)))
    random.shuffle(order)
    again = group_annotations([points[i] for i in order], [readers[i] for i in order], 2.0)
    assert {frozenset(order[i] for i in group) for group in again} == {frozenset(group) for group in groups}


# ---- one series


def test_two_nodules_are_found_in_order_with_their_readers(tmp_path):
    low, high = np.zeros((2, 4, 14, 44, 44), bool)
    low[:, :9, :24, :24], high[:, 5:, 20:, 20:] = balls(1), balls(2)
    nodules, _, _ = found_in(Archived(tmp_path, [high, low]))
    assert [[a.reader for a in n.annotations] for n in nodules] == [[1, 2, 3, 4]] * 2 and [n.reason for n in nodules] == ["", ""]
    assert nodules[0].first < nodules[1].first
    assert all(set(a.ratings) == set(MARKS) for n in nodules for a in n.annotations)


def spoil(archived, how):
    "Spoil what one reader drew."
    k, uid = 9, archived.datasets[9].SOPInstanceUID
    around = [(3, 3), (3, 9), (9, 9), (9, 3)]
    if how == "outside":
        archived.rois[1][0].append(roi(uid, archived.z(k), [(3, 3), (3, 900), (9, 9)]))
    elif how == "negative":
        archived.rois[1][0].append(roi(uid, archived.z(k), [(3, -1), (3, 9), (9, 9)]))
    elif how == "other slice":
        archived.rois[1][0].append(roi("1.2.3.4.5", archived.z(k), around))
    elif how == "height":
        archived.rois[1][0].append(roi(uid, archived.z(k) + 2, around))
    elif how == "three readers":
        archived.rois = archived.rois[:3]
    elif how == "one reader saw nothing":
        archived.rois[3] = []
    elif how == "no common voxel":
        points = trace(np.pad(np.ones((2, 2), bool), 13))[0][1] - (0, 0)
        archived.rois[3] = [[roi(uid, archived.z(k), points - points.min(0) + np.argwhere(archived.masks[0][0, k]).min(0) - (2, -4))]]
    elif how == "nothing inside":
        archived.rois[3] = [[roi(uid, archived.z(k), np.argwhere(archived.masks[0][0, k])[:2])]]


@pytest.mark.parametrize("how, words", [
    ("outside", "reader 2: an outline outside the image of 44 x 44 pixels"), ("negative", "reader 2: an outline outside the image"),
    ("other slice", "reader 2: an outline at -82 mm on a slice that is not in the series"), ("height", "reader 2: an outline at -80 mm on a slice at -82 mm"),
    ("three readers", "outlined by 3 of 3 readers"), ("one reader saw nothing", "outlined by 3 of 4 readers"),
    ("no common voxel", "no voxel that all four readers outlined"), ("nothing inside", "reader 4: an outline that encloses no pixel")])
def test_nodules_that_cannot_be_kept_are_listed_with_the_reason(tmp_path, how, words):
    archived = Archived(tmp_path / "in", [balls()])
    spoil(archived, how)
    archived.write()
    done = convert_archive(tmp_path / "in", tmp_path / "out", SMALL)
    [row] = done.nodules.itertuples()
    assert row.status == "left out" and row.reason.startswith(words) and done.series.status.tolist() == ["done"]
    assert not (tmp_path / "out" / "cases").exists()


# ---- the archive


def test_a_case_is_the_papers_crop_at_half_a_millimetre(tmp_path):
    archived = Archived(tmp_path / "in", [balls()]).write()
    done = convert_archive(tmp_path / "in", tmp_path / "out", ArchiveSettings(size_px=40))
    [row] = done.nodules.itertuples()
    assert row.status == "kept" and row.readers == 4 and row.malignancy == "4 4 4 4" and row.mean_malignancy == 4 and row.patient == "LIDC-IDRI-0001"
    # The same by another way: the whole CT at once.
    ct = Volume(archived.ct, archived.spacing, (-50, -60, -100), unit="HU")
    image, masks = crop_nodule(ct, archived.masks[0], 40, 3)
    heights = np.flatnonzero(archived.masks[0].any((0, 2, 3)))
    assert image.shape == (heights[-1] - heights[0] + 7, 40, 40)
    raters = [resample(image.with_array(mask.astype(np.uint8), unit=""), 0.5, "nearest") for mask in masks]
    wanted = {"image": resample(image, 0.5), "trimap": trimap_from_raters(raters, 1.0, vanishing="keep"),
              **{f"rater{i}": mask for i, mask in enumerate(raters, 1)}}
    case = tmp_path / "out" / "cases" / row.nodule
    assert {path.name for path in case.iterdir()} == {f"{part}.nii.gz" for part in wanted}
    for part, volume in wanted.items():
        made = read(case / f"{part}.nii.gz")
        assert np.allclose(made.array, volume.array, atol=1e-3) and np.allclose(made.origin, volume.origin, atol=1e-4) and made.spacing == (0.5,) * 3
    assert read(case / "image.nii.gz").unit == "HU"
    assert (row.z_first_mm, row.z_last_mm) == (archived.z(heights[0]), archived.z(heights[-1]))
    volume = archived.masks[0].sum() / 4 * np.prod(archived.spacing)
    assert abs(row.diameter_mm - (6 * volume / np.pi) ** (1 / 3)) < 0.01


def stamps(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}


def test_a_second_run_does_only_what_is_missing(tmp_path):
    for number in range(3):
        Archived(tmp_path / "in", [balls(number)], patient=f"LIDC-IDRI-000{number + 1}", seed=number).write()
    out = tmp_path / "out"
    first = convert_archive(tmp_path / "in", out, SMALL)
    assert first.before == 0 and (first.nodules.status == "kept").all() and len(first.nodules) == 3
    before = stamps(out)
    second = convert_archive(tmp_path / "in", out, SMALL)
    assert second.before == 3 and stamps(out) == before and second.nodules.equals(first.nodules)
    cases = sorted((out / "cases").iterdir())
    (cases[0] / "image.nii.gz").write_bytes(b"damaged")
    (cases[1] / "rater2.nii.gz").unlink()
    third = convert_archive(tmp_path / "in", out, SMALL)
    after = stamps(out)
    assert third.before == 1 and third.nodules.equals(first.nodules)
    assert {name for name in before if after[name] == before[name]} == {name for name in before if cases[2].name in name}
    record = next((out / "records").iterdir())
    record.write_text("{", encoding="utf-8")
    assert convert_archive(tmp_path / "in", out, SMALL).before == 2
    assert convert_archive(tmp_path / "in", out, ArchiveSettings(size_px=30, spacing_mm=1.5)).before == 0
    assert read(cases[0] / "image.nii.gz").shape[1] == round(30 * 0.75 / 1.5)


def test_cases_of_annotations_that_changed_do_not_stay(tmp_path):
    archived = Archived(tmp_path / "in", [balls()]).write()
    kept = convert_archive(tmp_path / "in", tmp_path / "out", SMALL).nodules.nodule[0]
    archived.rois = archived.rois[:3]
    archived.write()
    assert convert_archive(tmp_path / "in", tmp_path / "out", SMALL).nodules.status.tolist() == ["left out"]
    assert not (tmp_path / "out" / "cases" / kept).exists()


def bad_series(archived, how):
    "Ship a series that cannot be used."
    if how == "missing slice":
        return archived.write(without=(7,))
    if how == "duplicate UID":
        archived.datasets[3].SOPInstanceUID = archived.datasets[4].SOPInstanceUID
    elif how == "sagittal":
        for k, ds in enumerate(archived.datasets):
            ds.ImageOrientationPatient, ds.ImagePositionPatient = [0, 1, 0, 0, 0, 1], [2.0 * k, 0, 0]
    archived.write()
    xml = archived.folder / "069.xml"
    if how == "other series":
        xml.write_text(xml.read_text().replace(f"<SeriesInstanceUid>{archived.series}", "<SeriesInstanceUid>1.2.77"))
    elif how == "cut XML":
        xml.write_text(xml.read_text()[:-40])
    elif how == "huge coordinate":
        xml.write_text(xml.read_text().replace("<xCoord>", "<xCoord>12345678901234567890", 1))
    elif how == "huge rating":
        xml.write_text(xml.read_text().replace("<malignancy>4", "<malignancy>12345678901234567890", 1))
    elif how == "two XML":
        (archived.folder / "070.xml").write_text(xml.read_text().replace("<malignancy>4", "<malignancy>5"))
    elif how == "no XML":
        xml.unlink()
    elif how == "cut slice":
        path = archived.folder / "1-003.dcm"
        path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("how, words", [
    ("missing slice", "1 uneven gaps, the first of 4.00 mm"), ("duplicate UID", "share a SOPInstanceUID"), ("sagittal", "axial slices"),
    ("other series", "got '1.2.77'"), ("cut XML", "not well-formed"), ("two XML", "different readings of one series"),
    ("huge coordinate", "xCoord 12345678901234567890"), ("huge rating", "malignancy 12345678901234567890, but accepted is a number from -65535 to 65535"),
    ("no XML", "no XML file for the series"), ("cut slice", "1-003.dcm")])
def test_a_bad_series_is_listed_and_the_rest_goes_on(tmp_path, capsys, how, words):
    bad_series(Archived(tmp_path / "in", [balls()], patient="LIDC-IDRI-0001"), how)
    Archived(tmp_path / "in", [balls(1)], patient="LIDC-IDRI-0002", seed=1).write()
    assert main(["data", "lidc", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert words in said.err and "1 nodules kept" in said.out and "Traceback" not in said.err
    table = (tmp_path / "out" / "nodules.csv").read_text()
    assert "LIDC-IDRI-0002" in table and "LIDC-IDRI-0001" not in table
    assert len(list((tmp_path / "out" / "cases").iterdir())) == 1


@pytest.mark.parametrize("place", ["_readings", "convert_series"])
def test_a_fault_in_one_series_is_listed_by_its_type_and_the_rest_goes_on(tmp_path, monkeypatch, capsys, place):
    bad = Archived(tmp_path / "in", [balls()], patient="LIDC-IDRI-0001").write()
    Archived(tmp_path / "in", [balls(1)], patient="LIDC-IDRI-0002", seed=1).write()
    plain = getattr(lidc_archive, place)

    def faulty(what, *rest):
        if bad.folder in (getattr(what, "parent", None), *rest):
            raise TypeError("no such\nthing")
        return plain(what, *rest)

    monkeypatch.setattr(lidc_archive, place, faulty)
    assert main(["data", "lidc", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "TypeError: no such thing" in said.err and "1 nodules kept" in said.out
    assert "TypeError: no such thing" in (tmp_path / "out" / "series.csv").read_text()
    assert "LIDC-IDRI-0002" in (tmp_path / "out" / "nodules.csv").read_text()


def test_pixels_that_cannot_be_decoded_cost_one_nodule(tmp_path):
    low, high = np.zeros((2, 4, 30, 24, 24), bool)
    low[:, :9], high[:, 21:] = balls(1), balls(2)
    archived = Archived(tmp_path / "in", [low, high])
    archived.write()
    ds = archived.datasets[8]
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless  # no decoder of this package, and no such data
    ds.PixelData = pydicom.encaps.encapsulate([b"no picture at all"])
    save(ds, archived.folder / "1-009.dcm")
    done = convert_archive(tmp_path / "in", tmp_path / "out", SMALL)
    assert done.nodules.status.tolist() == ["left out", "kept"]
    assert "1-009.dcm, whose pixels cannot be decoded" in done.nodules.reason[0]


def test_two_series_in_one_folder(tmp_path):
    first = Archived(tmp_path / "in", [balls()])
    first.folder = tmp_path / "in" / "flat"
    other = Archived(tmp_path / "elsewhere", [balls(1)], patient="LIDC-IDRI-0001", seed=7)
    for k, ds in enumerate(other.datasets):
        save(ds, first.folder / f"0-{k:03d}.dcm")  # comes first in the folder
    first.write()
    done = convert_archive(tmp_path / "in", tmp_path / "out", SMALL)
    assert done.nodules.status.tolist() == ["kept"] and done.nodules.series.tolist() == [first.series]


def test_annotations_in_a_folder_of_their_own_and_copies_and_radiographs(tmp_path):
    archived = Archived(tmp_path / "in", [balls()]).write(xml=False)
    apart = tmp_path / "in" / "tcia-lidc-xml" / "157"
    apart.mkdir(parents=True)
    (apart / "158.xml").write_text(archived.xml())
    (apart / "159.XML").write_text(archived.xml())
    (apart / "160.xml").write_text('<IdriReadMessage xmlns="http://www.nih.gov/idri"/>')
    done = convert_archive(tmp_path / "in", tmp_path / "out", SMALL)
    assert done.nodules.status.tolist() == ["kept"] and done.series.status.tolist() == ["done"]


def test_a_nodule_larger_than_the_square_is_left_out(tmp_path):
    Archived(tmp_path / "in", [balls()]).write()
    done = convert_archive(tmp_path / "in", tmp_path / "out", ArchiveSettings(size_px=6))
    assert done.nodules.status.tolist() == ["left out"] and done.nodules.reason[0].startswith("size_px: got 6")


def test_a_full_disk_is_listed_and_made_good_by_the_next_run(tmp_path, monkeypatch):
    for number in range(2):
        Archived(tmp_path / "in", [balls(number)], patient=f"LIDC-IDRI-000{number + 1}", seed=number).write()
    plain, calls = lidc_archive.write, []

    def full(path, volume):
        calls.append(path)
        if len(calls) == 3:
            raise WriteError(f"{path}: could not be written (No space left on device).")
        return plain(path, volume)

    monkeypatch.setattr(lidc_archive, "write", full)
    done = convert_archive(tmp_path / "in", tmp_path / "out", SMALL)
    assert sorted(done.series.status) == ["done", "refused"] and "No space left" in "".join(done.series.reason)
    monkeypatch.setattr(lidc_archive, "write", plain)
    again = convert_archive(tmp_path / "in", tmp_path / "out", SMALL)
    assert again.before == 1 and again.nodules.status.tolist() == ["kept", "kept"]


def test_a_locked_folder_and_a_link_out_of_the_archive(tmp_path, monkeypatch):
    Archived(tmp_path / "in", [balls()]).write()
    outside = Archived(tmp_path / "elsewhere", [balls(1)], seed=5).write()
    os.symlink(outside.folder / "069.xml", tmp_path / "in" / "link.xml")
    locked, scandir = tmp_path / "in" / "locked", os.scandir
    locked.mkdir()

    def no_listing(name="."):
        if str(name) == str(locked):
            raise PermissionError(13, "Permission denied", str(name))
        return scandir(name)

    monkeypatch.setattr("os.scandir", no_listing)
    done = convert_archive(tmp_path / "in", tmp_path / "out", SMALL)
    assert done.nodules.status.tolist() == ["kept"] and done.series.status.tolist() == ["done", "refused"]
    assert "locked cannot be opened (Permission denied)" in done.series.reason[1]


def test_folders_without_an_archive_are_refused(tmp_path, capsys):
    for folder, out, words in ((tmp_path / "no", tmp_path / "out", "folder of the archive"), (tmp_path, tmp_path / "out", "output outside it"),
                               (tmp_path / "empty", tmp_path / "out", "0 CT series and no XML file")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=words):
            convert_archive(folder, out)
    assert not (tmp_path / "out").exists()
    assert main(["data", "lidc", str(tmp_path)]) == 2 and "-o" in capsys.readouterr().err
    assert main(["data", "lidc", str(tmp_path), "-o", "x", "--seed", "3"]) == 2 and "seed" in capsys.readouterr().err


def test_tables_and_records_are_plain_files(tmp_path):
    Archived(tmp_path / "in", [balls()]).write()
    convert_archive(tmp_path / "in", tmp_path / "out", SMALL)
    [record] = (tmp_path / "out" / "records").iterdir()
    assert set(json.loads(record.read_text())["files"]) == set(os.listdir(tmp_path / "out" / "cases"))
    assert (tmp_path / "out" / "series.csv").read_text().count("done") == 1


def test_a_series_that_lies_the_other_way_gives_the_same_case_in_its_own_voxels(tmp_path):
    "Outlines count pixels of the slices as they are stored: rows and columns that run backwards change where a case lies, not what is in it."
    for name, orientation in {"usual": [1, 0, 0, 0, 1, 0], "turned": [-1, 0, 0, 0, -1, 0]}.items():
        archived = Archived(tmp_path / name, [balls()])
        for ds in archived.datasets:
            ds.ImageOrientationPatient = orientation
        archived.write()
        done = convert_archive(tmp_path / name, tmp_path / f"{name}-out", ArchiveSettings(size_px=24, pad_slices=1, spacing_mm=None))
        assert done.nodules.status.tolist() == ["kept"]
    usual, turned = (next((tmp_path / f"{name}-out" / "cases").iterdir()) for name in ("usual", "turned"))
    for part in ("image", "rater1", "rater4", "trimap"):
        one, other = read(usual / f"{part}.nii.gz"), read(turned / f"{part}.nii.gz")
        assert np.array_equal(one.array, other.array) and np.allclose(one.direction, other.direction * [1, -1, -1])


def test_an_oblique_series_is_refused_by_name(tmp_path, capsys):
    archived = Archived(tmp_path / "in", [balls()])
    tilt = np.deg2rad(20)
    for k, ds in enumerate(archived.datasets):
        ds.ImageOrientationPatient = [1, 0, 0, 0, float(np.cos(tilt)), float(np.sin(tilt))]
        ds.ImagePositionPatient = [-50, float(-60 - 2 * k * np.sin(tilt)), float(-100 + 2 * k * np.cos(tilt))]
    archived.write()
    assert main(["data", "lidc", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "axial slices" in said and "Traceback" not in said and not (tmp_path / "out" / "cases").exists()


# ---- from the archive to samples


def soft_nodule(root, patient):
    "A series with a soft ball in lung, outlined by four readers."
    archived = Archived(root, [balls(patient)], patient=f"LIDC-IDRI-{patient:04d}", seed=patient)
    middle = np.argwhere(archived.masks[0].all(0)).mean(0)
    away = np.sqrt(sum(((g - m) * s) ** 2 for g, m, s in zip(np.indices(archived.ct.shape), middle, (1.5, 0.75, 0.75))))
    ct = -850 + 880 * np.clip((4.75 - away) / 2, 0, 1) + np.random.default_rng(patient).normal(0, 10, away.shape)
    for ds, plane in zip(archived.datasets, np.round(ct).astype(np.int16)):
        ds.PixelData = (plane + 1024).tobytes()
    archived.write()


def test_from_the_archive_to_a_sample_nothing_is_cropped_twice(tmp_path, capsys):
    for patient in range(1, 9):  # two of eight are the least test part
        soft_nodule(tmp_path / "in", patient)
    assert (convert_archive(tmp_path / "in", tmp_path / "nodules", ArchiveSettings(size_px=40)).nodules.status == "kept").all()
    cases, words = tmp_path / "nodules" / "cases", ["-o", str(tmp_path / "labelling"), "--setting", "methods", '["cf", "cf+"]']
    capsys.readouterr()
    assert main(["label", str(cases), *words]) == 1
    assert capsys.readouterr().err.count("say --setting size_px null") == 8 and not (tmp_path / "labelling" / "cases").exists()
    assert main(["label", str(cases), *words, "--setting", "size_px", "null"]) == 0
    labelling = open_labelling(tmp_path / "labelling")
    assert review_automatically(labelling).decision.isin(["cf", "cf+"]).all()
    export_set(labelling, tmp_path / "set")
    data = volume_set(tmp_path / "set")
    assert len(data.digests) == 8 and set(data.digests) == {path.name for path in cases.iterdir()}
    for name in data.digests:
        crop, case = read(cases / name / "image.nii.gz"), data.case(name)
        assert case.ct.shape == crop.shape and np.array_equal(case.ct.array, crop.array) and crop.shape[1:] == (60, 60)
    sample = Samples(data, data.split(0).train)[0]
    assert sample["name"] in data.digests and 0 < sample["alpha"].mean() < 1
