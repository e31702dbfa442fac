"""The data that come with the package, and the reader of Brain-growth against files made to harm it."""
import builtins
import io
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from medmatting import brain_growth, lidc, photographs
from medmatting.brain_growth import UnsafePickleError, read_pickle, read_zip
from medmatting.checks import InputError
from medmatting.registry import DataError


# ---- LIDC

@pytest.mark.parametrize("name, raters, shape, spacing, dice", [
    ("LIDC-IDRI-0001_nodule1", 4, (26, 128, 128), (2.5, 0.703, 0.703), 0.878),
    ("LIDC-IDRI-0002_nodule1", 2, (52, 128, 128), (1.25, 0.682, 0.682), 0.758),
    ("LIDC-IDRI-0003_nodule1", 1, (26, 128, 128), (2.5, 0.820, 0.820), None),
    ("LIDC-IDRI-0003_nodule2", 4, (26, 128, 128), (2.5, 0.820, 0.820), 0.765),
    ("LIDC-IDRI-0003_nodule3", 4, (26, 128, 128), (2.5, 0.820, 0.820), 0.758),
    ("LIDC-IDRI-0003_nodule4", 4, (26, 128, 128), (2.5, 0.820, 0.820), 0.863),
])
def test_nodules_are_what_their_page_says(name, raters, shape, spacing, dice):
    case = lidc.nodule(name)
    assert name in lidc.nodules() and case.ct.unit == "HU" and case.ct.array.dtype == np.int16
    assert case.ct.shape == shape and case.masks.shape == (raters, *shape) and case.masks.dtype == bool
    assert case.spacing == pytest.approx(spacing, abs=5e-4) and len(case.ratings) == raters
    start, stop = case.paper_z_range
    assert 0 <= start < stop <= shape[0] and not case.masks[:, :start].any() and not case.masks[:, stop:].any()
    assert "Armato" in case.attribution and "National Cancer Institute" in case.attribution
    if dice:
        assert lidc.mean_pairwise_dice(case.masks) == pytest.approx(dice, abs=5e-4)


def test_hounsfield_units_inside_and_outside():
    case = lidc.nodule("LIDC-IDRI-0003_nodule2")
    assert case.ct.array[case.masks.all(0)].mean() == pytest.approx(-71.9, abs=0.05)
    assert case.ct.array[~case.masks.any(0)].mean() == pytest.approx(-500.8, abs=0.05)


def test_two_nodules_of_one_patient_overlap_where_they_say():
    "Nodules 1 and 2 of patient 3 share part of the scan: the same voxels there, found through their origins."
    one, two = (lidc.nodule(f"LIDC-IDRI-0003_nodule{n}").ct for n in (1, 2))
    shift = np.round((np.array(two.origin) - one.origin)[::-1] / one.spacing).astype(int)
    low, high = np.maximum(shift, 0), np.minimum(one.shape, shift + two.shape)
    assert (high - low).min() > 10
    part = lambda array, start: array[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))]
    assert np.array_equal(part(one.array, (0, 0, 0)), part(two.array, shift))


def test_shapes_unpack_to_the_counts_of_their_table():
    table = lidc.shapes()
    assert len(table) == 897
    for index in (0, 1, 500, 896):
        shape, row = lidc.shape(index), table.loc[index]
        assert shape.masks.shape == (4, row.nz, row.ny, row.nx) and shape.masks.dtype == bool
        assert shape.masks.sum((1, 2, 3)).tolist() == [int(n) for n in row.voxels.split()]
        assert shape.masks.all(0).sum() == row.intersection_voxels and shape.masks.any(0).sum() == row.union_voxels
        assert shape.spacing == (row.slice_spacing_mm, row.pixel_spacing_mm, row.pixel_spacing_mm)


def test_agreement_over_all_shapes():
    masks = [lidc.shape(i).masks for i in range(897)]
    dice, ratio = ([f(m) for m in masks] for f in (lidc.mean_pairwise_dice, lidc.intersection_over_union))
    assert np.allclose([np.mean(dice), np.std(dice)], [0.773, 0.083], atol=5e-4)
    assert np.allclose([np.mean(ratio), np.std(ratio)], [0.444, 0.133], atol=5e-4)
    assert ratio.count(0) == 2


def test_agreement_by_hand():
    masks = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]], bool)
    assert lidc.mean_pairwise_dice(masks) == pytest.approx((2 * 1 / 4 + 2 * 1 / 3 + 2 * 1 / 3) / 3)
    assert lidc.intersection_over_union(masks) == pytest.approx(1 / 3)


@pytest.mark.parametrize("call", [
    lambda: lidc.nodule("LIDC-IDRI-0004_nodule1"), lambda: lidc.nodule("../../etc/passwd"), lambda: lidc.nodule(["a"]),
    lambda: lidc.shape(897), lambda: lidc.shape(-1), lambda: lidc.shape(1.5), lambda: lidc.shape("1"),
    lambda: lidc.mean_pairwise_dice(np.ones((1, 3), bool)), lambda: lidc.mean_pairwise_dice(np.ones((2, 3))),
    lambda: lidc.intersection_over_union(np.zeros((2, 3), bool)),
    lambda: photographs.skin("ISIC_1"), lambda: photographs.composite("lemur"), lambda: photographs.composite(3),
])
def test_refusals_are_one_sentence(call):
    with pytest.raises(InputError) as refusal:
        call()
    assert "accepted is" in str(refusal.value) and "\n" not in str(refusal.value)


# ---- photographs

def test_composites_obey_the_compositing_equation():
    for name in photographs.composite_names():
        case = photographs.composite(name)
        alpha = case.alpha[..., None].astype(float)
        assert case.alpha.dtype == np.float32 and case.alpha.min() == 0 and case.alpha.max() == 1
        mixed = np.round(alpha * case.foreground + (1 - alpha) * case.background, 4)
        assert np.abs(mixed - case.image).max() <= 0.5
        for trimap, unknown in ((case.trimap_r3, 0.081), (case.trimap_r10, 0.127)):
            assert (trimap == 128).mean() == pytest.approx(unknown, abs=5e-4)
            assert case.alpha[trimap == 255].min() >= 0.98 and case.alpha[trimap == 0].max() <= 0.02


def test_skin_photographs():
    for name in photographs.skin_names():
        lesion = photographs.skin(name)
        assert lesion.image.dtype == np.uint8 and lesion.image.shape == (*lesion.mask.shape, 3)
        assert lesion.mask.dtype == bool and 0.02 < lesion.mask.mean() < 0.5 and max(lesion.mask.shape) == 512


def test_lemur_and_reference_scores():
    photograph = photographs.lemur()
    assert set(np.unique(photograph.trimap)) == {0, 128, 255} and photograph.image.shape == (440, 680, 3)
    scores = photographs.reference_scores()
    row = scores[(scores.background == "coffee") & (scores.method == "cf")].iloc[0]
    assert len(scores) == 20 and row.SAD == 669.0 and row.MSE == 0.001213


# ---- Brain-growth: hostile pickles

class Call:
    "Pickles to a call of any function."

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Array:
    "Pickles like an array, with a state that NumPy would not write."

    def __init__(self, shape, content, kind):
        self.state = (1, shape, np.dtype(kind), False, content)

    def __reduce__(self):
        rebuild = np.zeros(1, np.uint8).__reduce__()[0]
        return rebuild, (np.ndarray, (0,), b"b"), self.state


def test_arrays_of_bytes_pass():
    for order in "CF":
        array = np.asarray(np.arange(24).reshape(2, 3, 4), np.uint8, order=order)
        for protocol in (3, 4):
            got = read_pickle(pickle.dumps({"a": [array, array], "name": "x"}, protocol=protocol))
            assert np.array_equal(got["a"][0], array) and got["name"] == "x" and got["a"][0].dtype == np.uint8


def test_both_names_of_the_numpy_core_are_known():
    for core in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = (b"\x80\x02c" + core + b"\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
                   b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87RK\x00U\x03\x01\x02\x03tb.")
        assert read_pickle(content.replace(b"K\x00U\x03", b"\x89C\x03")).tolist() == [1, 2, 3]


@pytest.mark.parametrize("function, arguments", [
    (os.system, ("touch {marker}",)), (builtins.eval, ("open('{marker}', 'w')",)),
    (builtins.exec, ("open('{marker}', 'w')",)), (io.open, ("{marker}", "w")), (getattr, ("x", "__class__")),
    (np.load, ("{marker}",)), (bytearray, (10,)), (shutil.rmtree, ("{marker}",)),
])
def test_calls_are_refused_and_not_run(function, arguments, tmp_path):
    marker = tmp_path / "marker"
    call = Call(function, *(a.format(marker=marker) if isinstance(a, str) else a for a in arguments))
    for value in (call, {"case01": {"image": call}}, [Call(tuple, [call])], Call(getattr, call, "x")):
        for protocol in (0, 2, 4):
            with pytest.raises(UnsafePickleError, match="asks for"):
                read_pickle(pickle.dumps(value, protocol=protocol))
    assert not marker.exists()


@pytest.mark.parametrize("shape, content, kind", [
    ((10**12,), b"\0" * 6, "u1"), ((2**40, 2**40), b"", "u1"), ((-1, -6), b"\0" * 6, "u1"), ((0,), b"", "u1"),
    ((6,), b"\0" * 7, "u1"), ((6,), [1] * 6, "u1"), (("6",), b"\0" * 6, "u1"), ((1,) * 6 + (6,), b"\0" * 6, "u1"),
    ((2**21,), b"\0" * 2**21, "u1"), ((6,), b"\0" * 6, "O"), ((6,), b"\0" * 6, "f8"), ((6,), b"\0" * 6, "V1"),
])
def test_arrays_that_lie_about_their_size_or_type_are_refused(shape, content, kind):
    with pytest.raises(UnsafePickleError):
        read_pickle(pickle.dumps(Array(shape, content, kind), protocol=3))


def test_calling_the_array_class_itself_allocates_nothing():
    with pytest.raises(DataError):
        read_pickle(pickle.dumps(Call(np.ndarray, (10**12,))))


def test_claimed_lengths_are_not_believed():
    for opcode, size in ((b"\x8e", struct.pack("<Q", 2**50)), (b"\x8d", struct.pack("<Q", 2**50)),
                         (b"\x8b", struct.pack("<i", 2**31 - 1)), (b"\x96", struct.pack("<Q", 2**50))):
        with pytest.raises(DataError, match="damaged"):
            read_pickle(b"\x80\x05" + opcode + size + b"x.")
    with pytest.raises(DataError):
        read_pickle(b"\x80\x04]r\xff\xff\xff\xffj\xff\xff\xff\xff" + b"K\x01.")  # a memo index of four thousand million


def test_no_memory_is_set_aside_for_a_claimed_length():
    tracemalloc.start()
    with pytest.raises(DataError):
        read_pickle(b"\x80\x05\x8e" + struct.pack("<Q", 2**33) + b"x.")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_lists_that_repeat_each_other_take_no_time():
    value = ["x"]
    for _ in range(200):
        value = [value, value]
    assert isinstance(read_pickle(pickle.dumps(value)), list)


@pytest.mark.parametrize("content", [b"", b".", b"\x80\x04", b"not a pickle", pickle.dumps({"a": 1}), pickle.dumps((1, 2)),
                                     b"\x80\x04]\x94(h\x00h\x00e", pickle.dumps(np.zeros(3, np.uint8))[:-9]])
def test_damaged_and_foreign_pickles_are_refused(content):
    with pytest.raises(DataError) as refusal:
        read_pickle(content)
    assert "\n" not in str(refusal.value)


def test_persistent_ids_and_extensions_are_refused():
    for content in (b"\x80\x04\x8c\x01xQ.", b"\x80\x02\x82\x01."):
        with pytest.raises(DataError):
            read_pickle(content)


# ---- Brain-growth: hostile zip files

def make_zip(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil", "a/../../evil", "..\\evil", "C:/evil", "\\evil"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="leads out"):
        read_zip(make_zip(tmp_path / "x.zip", {name: b"1"}))


def test_bombs_are_refused_whatever_their_header_says(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a.pkl": bytes(50_000_000)})
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="larger than"):
        read_zip(path)
    content = path.read_bytes().replace(struct.pack("<I", 50_000_000), struct.pack("<I", 1000))
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_zip(path)
    with pytest.raises(DataError, match="at most"):
        read_zip(make_zip(tmp_path / "many.zip", {f"{i}.png": b"" for i in range(200)}))


def test_damaged_zip_files_are_refused(tmp_path):
    path = make_zip(tmp_path / "x.zip", {"a.png": np.random.default_rng(0).bytes(5000)})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[1000] ^= 255
    for content in (whole[: len(whole) // 2], b"", b"PK", bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="fetch it again"):
            read_zip(path)


# ---- Brain-growth: the cases themselves

def test_brain_growth_cases(brain_growth_dir):
    cases = brain_growth.load(brain_growth_dir)
    assert [case.name for case in cases] == [f"case{i:02d}" for i in range(1, 40)]
    for case in cases:
        assert case.image.shape == (128, 128) and case.image.dtype == case.alpha_raw.dtype == np.uint8
        assert case.masks.shape == (7, 128, 128) and case.masks.dtype == bool
        assert case.alpha.dtype == np.float32 and np.array_equal(np.round(case.alpha * 255), case.alpha_raw)
        assert set(np.unique(case.trimap)) == {0, 128, 255} and np.array_equal(case.region, case.trimap_raw == 128)
        assert np.array_equal(case.trimap != 128, (case.trimap_raw == 0) | (case.trimap_raw == 255))
        overlap = (case.masks.any(0) & (case.trimap_raw > 0)).sum() / case.masks.any(0).sum()
        assert overlap > 0.9  # the trimap belongs to this case
    assert np.mean([case.region.sum() for case in cases]) == pytest.approx(2656.95, abs=0.005)
    assert np.mean([(case.alpha_raw == 0).mean() for case in cases]) == pytest.approx(0.804, abs=5e-4)


def test_brain_growth_is_found_through_the_environment(brain_growth_dir, monkeypatch):
    for folder in (brain_growth_dir, brain_growth_dir.parent):
        monkeypatch.setenv("MEDMATTING_DATA", str(folder))
        if folder.name == "brain_growth" or (folder / "brain_growth") == brain_growth_dir:
            assert len(brain_growth.load()) == 39


def test_brain_growth_with_a_wrong_hash_is_not_read(brain_growth_dir, tmp_path):
    for name in ("brain_growth_alpha.zip", "trimap_brain.zip"):
        shutil.copyfile(brain_growth_dir / name, tmp_path / name)
    (tmp_path / "brain_growth_alpha.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="brain_growth_alpha.zip: does not have the SHA-256"):
        brain_growth.load(tmp_path)


def test_absent_brain_growth_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match="medmatting data fetch brain_growth"):
        brain_growth.load(tmp_path)
