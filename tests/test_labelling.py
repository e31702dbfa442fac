"""Raters to candidates, decisions to a data set: what is stored, what is refused, what survives."""

import json
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import miniature_dicom
from medmatting import InputError, Volume, WriteError, matte, read, trimap_from_raters, write
from medmatting import decisions as d
from medmatting import labelled_set as ls
from medmatting import labelling as lb
from miniature_labelling import SMALL, ball, nodule, write_labelling

@pytest.fixture
def labelling(tmp_path):
    "Two cases with three candidates each."
    return write_labelling(tmp_path / "labelling")


def statuses(labelling, *arguments, **options):
    table = lb.make_candidates(labelling, *arguments, progress=False, **options)
    return dict(zip(zip(table.case, table.method), table.status))


# ---- candidates


def test_the_eight_of_the_paper_are_the_default():
    assert set(lb.CANDIDATES) == {m + plus for m in ("cf", "knn", "lb", "if") for plus in ("", "+")}
    assert lb.LabellingSettings().methods == lb.CANDIDATES and lb.LabellingSettings().least_raters == 4


def test_trimap_and_candidates_are_those_of_the_functions(labelling):
    image, masks = nodule(0)
    case = lb.read_case(labelling, "case-0")
    trimap = trimap_from_raters(masks, 1.0, spacing=image.spacing, vanishing="keep")
    np.testing.assert_array_equal(case.trimap, trimap)
    np.testing.assert_array_equal(np.stack([m.array for m in case.raters]) > 0, np.stack(masks))
    assert list(case.candidates) == ["cf", "cf+", "lb"]
    np.testing.assert_allclose(case.candidates["cf+"], matte(image, trimap, "cf+"), atol=1e-6)


def test_the_preprocessing_is_that_of_the_paper(tmp_path):
    ct = np.full((20, 150, 140), -850, np.int16)
    mask = np.zeros(ct.shape, bool)
    mask[9:12, 70:80, 60:70] = True
    made = lb.open_labelling(tmp_path / "paper")
    lb.add_case(made, "one", Volume(ct, (2.5, 0.7, 0.7), unit="HU"), [mask] * 4)
    case = lb.read_case(made, "one")
    assert np.allclose(case.image.spacing, 0.5) and case.image.shape == (round(9 * 2.5 / 0.5), round(128 * 0.7 / 0.5), round(128 * 0.7 / 0.5))
    assert case.scanner.shape == (9, 128, 128) and case.scanner.spacing == (2.5, 0.7, 0.7) and case.image.unit == "HU"


def test_a_second_run_keeps_and_a_damaged_or_lost_file_is_made_again(labelling):
    assert set(statuses(labelling).values()) == {"kept"}
    before = lb.read_case(labelling, "case-0").candidates["cf"].array
    folder = labelling.case_folder("case-0")
    (folder / "cf.nii.gz").write_bytes((folder / "cf.nii.gz").read_bytes()[:-20])
    (folder / "lb.json").write_text("{")
    found = statuses(labelling)
    assert [found["case-0", m] for m in ("cf", "cf+", "lb")] == ["computed", "kept", "computed"]
    assert {found["case-1", m] for m in SMALL.methods} == {"kept"}
    np.testing.assert_array_equal(lb.read_case(labelling, "case-0").candidates["cf"], before)


def test_other_data_under_a_name_makes_the_candidates_again(labelling):
    assert not lb.add_case(labelling, "case-0", *nodule(0))
    assert lb.add_case(labelling, "case-0", *nodule(7))
    found = statuses(labelling)
    assert found["case-0", "cf"] == "computed" and found["case-1", "cf"] == "kept"


def test_what_is_wrong_with_one_case_is_listed_and_the_rest_goes_on(tmp_path):
    image, masks = nodule(0)
    for name, chosen in {"good": masks, "three": masks[:3], "apart": [ball(centre=(3, 4, 4), radius=2), *masks[1:]], "empty": []}.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        if name != "empty":
            write(tmp_path / "in" / name / "image.nii.gz", image)
        for i, mask in enumerate(chosen):
            write(tmp_path / "in" / name / f"rater{i}.nii.gz", mask.astype(np.uint8), like=image)
    (tmp_path / "in" / "torn").mkdir()
    (tmp_path / "in" / "torn" / "image.nii.gz").write_bytes(b"no image")
    write(tmp_path / "in" / "torn" / "rater1.nii.gz", masks[0].astype(np.uint8), like=image)
    made = lb.open_labelling(tmp_path / "out", SMALL)
    table = lb.make_candidates(made, lb.find_sources(tmp_path / "in"), progress=False).set_index("case")
    reasons = table[table.status == "failed"].reason
    assert sorted(reasons.index) == ["apart", "empty", "three", "torn"] and made.cases() == ("good",)
    for name, said in {"apart": "without a common voxel", "empty": "image.*", "three": "3 rater(s)", "torn": "cannot be read"}.items():
        assert said in reasons[name]
    assert len(table.loc[["good"]]) == 3 and set(table.loc[["good"]].status) == {"computed"}


def test_a_method_that_fails_is_listed_and_tried_again(tmp_path, monkeypatch):
    made = lb.open_labelling(tmp_path, SMALL)
    lb.add_case(made, "one", *nodule())
    solve = lb.matte
    monkeypatch.setattr(lb, "matte", lambda image, trimap, method, **o: solve(image, trimap, method, **o) if method != "lb" else 1 / 0)
    table = lb.make_candidates(made, progress=False)
    assert table.status.tolist() == ["computed", "computed", "failed"] and "division" in table.reason[2]
    assert list(lb.read_case(made, "one").candidates) == ["cf", "cf+"]
    monkeypatch.undo()
    assert statuses(made) == {("one", "cf"): "kept", ("one", "cf+"): "kept", ("one", "lb"): "computed"}


def test_processes_give_what_one_process_gives(labelling, tmp_path):
    for i in range(2):
        (tmp_path / "in" / f"case-{i}").mkdir(parents=True)
        image, masks = nodule(i)
        write(tmp_path / "in" / f"case-{i}" / "image.nii.gz", image)
        for k, mask in enumerate(masks):
            write(tmp_path / "in" / f"case-{i}" / f"rater{k}.nii.gz", mask.astype(np.uint8), like=image)
    other = lb.open_labelling(tmp_path / "other", SMALL)
    assert set(statuses(other, lb.find_sources(tmp_path / "in"), workers=2).values()) == {"computed"}
    for name in labelling.cases():
        one, two = lb.read_case(labelling, name), lb.read_case(other, name)
        for method in SMALL.methods:
            np.testing.assert_allclose(one.candidates[method], two.candidates[method], atol=1e-5)


def test_a_process_that_dies_costs_its_own_case_only(tmp_path, monkeypatch):
    made = lb.open_labelling(tmp_path, SMALL)
    lb.add_case(made, "dies", *nodule(0))
    lb.add_case(made, "lives", *nodule(1))
    monkeypatch.setenv("DIES", "dies")
    monkeypatch.setattr(lb, "label_case", _dies_on_one)
    table = pd.DataFrame(sum(lb._in_processes(made, ["dies", "lives"], 2), []))
    assert dict(zip(table.case, table.status)) == {"dies": "failed", "lives": "computed"} and "memory" in table.reason[table.case == "dies"].item()


def _dies_on_one(labelling, source):
    "Stands for a case that memory does not suffice for."
    if source == "dies":
        os._exit(9)
    return [lb._row(source, "cf", "computed", {})]


def test_settings_stay_those_a_folder_was_begun_with(labelling):
    assert lb.open_labelling(labelling.folder).settings == SMALL
    with pytest.raises(InputError, match="methods"):
        lb.open_labelling(labelling.folder, lb.LabellingSettings(methods=("cf",), size_px=None, spacing_mm=None))
    (labelling.folder / "labelling.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        lb.open_labelling(labelling.folder)


def test_an_image_that_looks_cropped_and_resampled_is_not_cropped_again(tmp_path):
    image, masks = nodule()
    fine = image.with_array(image.array, spacing=(0.5, 0.5, 0.5))
    made = lb.open_labelling(tmp_path, lb.LabellingSettings(methods=("cf",), size_px=12))
    with pytest.raises(InputError, match="one: got voxels of 0.5 mm.*size_px 12.*size_px null.*spacing_mm null"):
        lb.add_case(made, "one", fine, masks)
    made = lb.open_labelling(tmp_path, lb.LabellingSettings(methods=("cf",), size_px=None))  # no case yet: settings may change
    assert lb.add_case(made, "one", fine, masks) and lb.read_case(made, "one").image.shape == image.shape
    with pytest.raises(InputError, match="other size_px, spacing_mm"):
        lb.open_labelling(tmp_path, lb.LabellingSettings(methods=("cf",), size_px=12, spacing_mm=None))
    scan = lb.open_labelling(tmp_path / "scan", lb.LabellingSettings(methods=("cf",), size_px=12, spacing_mm=None))
    assert lb.add_case(scan, "one", fine, masks) and lb.read_case(scan, "one").image.shape[1:] == (12, 12)


def test_masks_on_another_grid_are_refused_for_crops_too(tmp_path):
    image, masks = nodule()
    made = lb.open_labelling(tmp_path, SMALL)  # size_px is None
    moved = [image.with_array(mask.astype(np.uint8), unit="", origin=(0.0, 3.0, 0.0)) for mask in masks]
    with pytest.raises(InputError, match="masks: got voxels up to 3 mm away"):
        lb.add_case(made, "moved", image, moved)
    with pytest.raises(InputError, match="the grid of the image"):
        lb.add_case(made, "short", image, [mask[1:] for mask in masks])
    assert made.cases() == ()


@pytest.mark.parametrize("methods", [("cf", "cf"), (), ("bayesian",), ("cff",), "cf"])
def test_methods_that_cannot_be_candidates_are_refused(tmp_path, methods):
    with pytest.raises(InputError, match="methods"):
        lb.open_labelling(tmp_path / "new", lb.LabellingSettings(methods=methods))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "x" * 200, 3])
def test_a_name_cannot_lead_elsewhere(tmp_path, name):
    with pytest.raises(InputError):
        lb.add_case(lb.open_labelling(tmp_path), name, *nodule())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labelling.json"]


# ---- decisions


def test_what_stands_follows_choices_discards_and_undo(labelling):
    log, (a, b) = d.open_decisions(labelling), (lb.read_case(labelling, n) for n in labelling.cases())
    state = lambda who: {case: x.get("method", x.get("reason")) for case, x in d.standing(log.read()).get(who, {}).items()}
    d.choose(log, "Ada", a, "cf")
    d.discard(log, "Ada", b, "image artefact")
    d.choose(log, "Bob", a, "cf+")
    d.choose(log, "Ada", a, "lb")
    assert state("Ada") == {a.name: "lb", b.name: "image artefact"} and state("Bob") == {a.name: "cf+"}
    assert d.undo(log, "Ada")["method"] == "lb" and state("Ada")[a.name] == "cf"
    assert d.undo(log, "Ada")["reason"] == "image artefact" and state("Ada") == {a.name: "cf"}
    d.undo(log, "Ada")
    with pytest.raises(InputError, match="nothing to take back"):
        d.undo(log, "Ada")
    assert state("Ada") == {} and state("Bob") == {a.name: "cf+"}
    assert [x["number"] for x in log.read()] == list(range(1, 8))
    line = log.read()[0]
    assert line["matte"] == a.digests["cf"] and line["order"] == ["cf", "cf+", "lb"] and line["alike"] == ["cf", "lb"]


def test_notes_are_kept_apart_and_can_be_replaced(labelling):
    log = d.open_decisions(labelling)
    for who, text in (("Ada", "first"), ("Bob", "β <b>"), ("Ada", "second"), ("Eve", "x"), ("Eve", "")):
        d.note(log, who, "case-0", text)
    assert d.notes(log.read(), "case-0") == {"Ada": "second", "Bob": "β <b>"} and d.standing(log.read()) == {}


def test_what_cannot_be_decided_is_refused_and_not_written(labelling):
    log, case = d.open_decisions(labelling), lb.read_case(labelling, "case-0")
    for act in (lambda: d.choose(log, "Ada", case, "knn"), lambda: d.discard(log, "Ada", case, "  "), lambda: d.choose(log, "\n", case, "cf"),
                lambda: d.note(log, "Ada", "case-0", "x" * 3000)):  # fmt: skip
        with pytest.raises(InputError):
            act()
    assert log.read() == []


def _decide(path, who, count):
    "Another process that decides as fast as it can."
    log = d.DecisionLog(path)
    for i in range(count):
        log.append(lambda decisions, i=i: {"reviewer": who, "case": f"{i}", "action": "note", "text": "ü" * (i % 50)})


def test_two_reviewers_at_once_lose_no_line(tmp_path):
    context = multiprocessing.get_context("spawn")
    path = tmp_path / "decisions.jsonl"
    both = [context.Process(target=_decide, args=(path, who, 40)) for who in ("Ada", "Bob")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    found = d.DecisionLog(path).read()
    assert [x["number"] for x in found] == list(range(1, 81)) and not list(tmp_path.glob("*incomplete*"))
    for who in ("Ada", "Bob"):
        assert [x["case"] for x in found if x["reviewer"] == who] == [str(i) for i in range(40)]


@settings(max_examples=30)
@given(cut=st.integers(1, 10**6))
def test_any_cut_of_the_last_line_is_set_aside_with_a_message(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("log") / "decisions.jsonl"
    _decide(path, "Ada", 2)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    kept = cut % len(last)  # bytes of the last line that reached the disk
    path.write_bytes(whole[: len(whole) - len(last) + kept])
    log = d.DecisionLog(path)
    if 0 < kept < len(last) - 1:
        with pytest.warns(UserWarning, match="incomplete"):
            assert len(log.read()) == 1
        assert path.with_name("decisions.jsonl.incomplete1").read_bytes() == last[:kept] and len(log.messages) == 1
    else:
        assert len(log.read()) == (2 if kept else 1)  # nothing was begun, or only the newline is missing
    _decide(path, "Bob", 1)
    assert [x["number"] for x in d.DecisionLog(path).read()] == list(range(1, len(log.read()) + 1))


@pytest.mark.parametrize("line", [b"{}\n", b"nonsense\n", b"\n", b'{"number": 1, "action": "choose"}\n'])
def test_damage_in_the_middle_is_refused_and_nothing_is_changed(tmp_path, line):
    path = tmp_path / "decisions.jsonl"
    _decide(path, "Ada", 2)
    first, second = path.read_bytes().splitlines(keepends=True)
    for content in (line + second, first + line + second, second):
        path.write_bytes(content)
        with pytest.raises(InputError, match="line"):
            _decide(path, "Ada", 1)
        assert path.read_bytes() == content


def test_a_full_disk_is_told_and_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "decisions.jsonl"
    _decide(path, "Ada", 2)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(d.os, "fsync", full)
    with pytest.raises(WriteError, match="No space left.*decide again"):
        _decide(path, "Ada", 1)
    assert path.read_bytes() == before


def test_a_line_is_flushed_to_disk_before_it_counts(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(d.os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), real(handle)))
    _decide(tmp_path / "decisions.jsonl", "Ada", 3)
    assert synced[-1] == (tmp_path / "decisions.jsonl").stat().st_size and len(synced) == 3


def test_blind_order_depends_on_seed_and_case_alone():
    methods = lb.CANDIDATES
    assert d.blind_order(methods, "case-1", 5) == d.blind_order(methods, "case-1", 5) and sorted(d.blind_order(methods, "x")) == sorted(methods)
    assert len({d.blind_order(methods, f"case-{i}") for i in range(20)}) > 15
    assert d.blind_order(methods, "case-1", 5) != d.blind_order(methods, "case-1", 6)
    # The same on every machine and with every release, or a review that goes on would change its order.
    assert d.blind_order(methods, "case-1") == ("cf", "knn", "if", "cf+", "lb+", "knn+", "if+", "lb")


def decided(who, case, what, alike=None):
    "A line of the table."
    return {"reviewer": who, "case": case, **({"action": "discard", "reason": "r"} if what == "discard" else
            {"action": "choose", "method": what, "alike": alike or [what]})}  # fmt: skip


def table(pairs):
    lines = [decided(who, f"c{i}", what) for i, pair in enumerate(pairs) for who, what in zip("AB", pair)]
    return [{**line, "number": n} for n, line in enumerate(lines, 1)]


def test_kappa_of_a_printed_table():
    # 2 x 2 table 20, 5, 10, 15: observed 0.7, expected 0.5, kappa 0.4 (the usual textbook example).
    pairs = [("cf", "cf")] * 20 + [("cf", "lb")] * 5 + [("lb", "cf")] * 10 + [("lb", "lb")] * 15
    found = d.agreement(table(pairs), "A", "B")
    assert (found.cases, found.equal, found.share) == (50, 35, 0.7) and found.kappa == pytest.approx(0.4) and len(found.differing) == 15


@given(st.lists(st.tuples(st.sampled_from(["cf", "lb", "discard"]), st.sampled_from(["cf", "lb", "discard"])), min_size=1, max_size=12))
def test_kappa_by_counting(pairs):
    found = d.agreement(table(pairs), "A", "B")
    kinds = ("cf", "lb", "discard")
    counts = np.array([[sum(pair == (a, b) for pair in pairs) for b in kinds] for a in kinds]) / len(pairs)
    chance = counts.sum(0) @ counts.sum(1)
    assert found.share == pytest.approx(np.trace(counts))
    if chance < 1 - 1e-12:
        assert found.kappa == pytest.approx((np.trace(counts) - chance) / (1 - chance))
    else:
        assert np.isnan(found.kappa)


def test_agreement_takes_mattes_that_look_alike_as_one_and_needs_common_cases():
    same = [decided("A", "c", "cf", ["cf", "lb"]), decided("B", "c", "lb", ["cf", "lb"]), decided("B", "only", "cf")]
    found = d.agreement([{**line, "number": n} for n, line in enumerate(same, 1)], "A", "B")
    assert (found.cases, found.equal) == (1, 1)
    none = d.agreement([], "A", "B")
    assert none.cases == 0 and np.isnan(none.share) and np.isnan(none.kappa)


# ---- the automatic reviewer


def test_the_mixing_residual_by_hand():
    image, _ = nodule(noise=0)
    trimap = np.zeros(image.shape, np.uint8)
    trimap[4:7, 8:12, 8:12], trimap[5, 9:11, 9:11] = 128, 255
    alpha = np.random.default_rng(0).uniform(size=image.shape).astype(np.float32)
    lesion = trimap > 0
    near = ~lesion & (np.array([[[np.sqrt(((np.argwhere(lesion) - (z, y, x)) ** 2).sum(1)).min() for x in range(20)] for y in range(20)]
                                for z in range(11)]) <= 5)  # fmt: skip
    back = np.median(image.array[near].astype(float))
    wanted = np.sqrt(np.mean((image.array[lesion] - (alpha[lesion] * 30 + (1 - alpha[lesion]) * back)) ** 2)) / (30 - back)
    assert d.mixing_residual(image, alpha, trimap) == pytest.approx(wanted, rel=1e-5)


def test_the_automatic_reviewer_decides_alike_and_once(labelling):
    first = d.review_automatically(labelling)
    lines = d.open_decisions(labelling).read()
    assert set(first.decision) <= set(SMALL.methods) and len(lines) == 2
    second = d.review_automatically(labelling)
    assert first.equals(second) and len(d.open_decisions(labelling).read()) == 2
    for name, row in first.iterrows():
        assert row[row.decision] == min(row[list(SMALL.methods)])
    lb.add_case(labelling, "case-0", *nodule(9))
    lb.make_candidates(labelling, progress=False)
    d.review_automatically(labelling)
    assert [x["case"] for x in d.open_decisions(labelling).read()] == ["case-0", "case-1", "case-0"]


def test_the_automatic_reviewer_discards_what_no_candidate_explains(tmp_path):
    made = lb.open_labelling(tmp_path, SMALL)
    image, masks = nodule()
    lb.add_case(made, "bone", image.with_array(np.where(np.stack(masks).any(0), 900, image.array).astype(np.float32)), masks)
    lb.make_candidates(made, progress=False)
    found = d.review_automatically(made)
    assert found.decision["bone"] == "discard" and "unexplained" in found.reason["bone"]


# ---- the data set


def test_the_set_holds_what_was_accepted_and_says_why_the_rest_was_not(labelling, tmp_path):
    lb.add_case(labelling, "case-2", *nodule(2))
    lb.add_case(labelling, "case-3", *nodule(3))
    lb.make_candidates(labelling, progress=False)
    log, case = d.open_decisions(labelling), lambda i: lb.read_case(labelling, f"case-{i}")
    d.choose(log, "Ada", case(0), "cf")
    d.choose(log, "Bob", case(0), "lb")  # looks like cf
    d.choose(log, "Ada", case(1), "cf")
    d.choose(log, "Bob", case(1), "cf+") if "cf+" not in d.alike(case(1))["cf"] else d.discard(log, "Bob", case(1), "no")
    d.discard(log, "Ada", case(2), "image artefact")
    d.note(log, "Ada", "case-2", "a stent, in part")
    table = ls.export_set(labelling, tmp_path / "set").set_index("case")
    assert table.accepted.tolist() == [True, False, False, False] and table.method["case-0"] == "cf"
    for i, said in {1: "disagree", 2: "image artefact", 3: "not decided"}.items():
        assert said in table.reason[f"case-{i}"]
    assert table.notes["case-2"] == "Ada: a stent, in part"
    (only,) = ls.read_set(tmp_path / "set")
    for name in ("image", "trimap"):
        np.testing.assert_array_equal(getattr(only, name), getattr(case(0), name))
    np.testing.assert_array_equal(only.alpha, case(0).candidates["cf"])
    assert len(only.raters) == 4 and only.alpha.spacing == pytest.approx(case(0).image.spacing)
    stored = pd.read_csv(tmp_path / "set" / "cases.csv", keep_default_na=False)
    assert stored.reason.tolist() == table.reason.tolist()
    about = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert (about["accepted"], about["cases"], about["methods"]) == (1, 4, {"cf": 1})
    assert ls.export_set(labelling, tmp_path / "set", reviewers=["Ada"]).accepted.tolist() == [True, True, False, False]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labelling", "set"]


def test_a_matte_that_changed_after_it_was_chosen_is_left_out(labelling, tmp_path):
    log = d.open_decisions(labelling)
    for name in labelling.cases():
        d.choose(log, "Ada", lb.read_case(labelling, name), "cf")
    lb.add_case(labelling, "case-0", *nodule(9))
    (labelling.case_folder("case-1") / "trimap.nii.gz").unlink()
    lb.make_candidates(labelling, progress=False)
    table = ls.export_set(labelling, tmp_path / "set").set_index("case")
    assert not table.accepted.any() and "changed" in table.reason["case-0"] and "not readable" in table.reason["case-1"]


def test_what_is_accepted_is_what_a_reviewer_chose(labelling):
    case = lb.read_case(labelling, "case-0")
    case = replace(case, candidates={m: case.candidates[m] for m in ("cf+", "lb")}, digests={m: case.digests[m] for m in ("cf+", "lb")})
    said = lambda method, alike: {"action": "choose", "method": method, "matte": case.digests[method], "alike": alike, "time": "now"}
    alike = ["cf", "cf+", "lb"]  # when they were chosen there was also cf, which looked the same
    assert ls.verdict(case, {"Ada": said("lb", alike), "Bob": said("cf+", alike)}).method == "cf+"
    found = ls.verdict(case, {"Ada": said("lb", ["cf", "lb"]), "Bob": said("cf+", ["cf", "cf+"])})  # each like cf, not like the other
    assert not found.method and "disagree" in found.reason


def test_a_set_is_complete_or_absent(labelling, tmp_path, monkeypatch):
    d.review_automatically(labelling)
    ls.export_set(labelling, tmp_path / "set")
    before = sorted((p.relative_to(tmp_path), p.read_bytes()) for p in (tmp_path / "set").rglob("*") if p.is_file())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ls, "write", full)
    with pytest.raises(WriteError, match="nothing was changed"):
        ls.export_set(labelling, tmp_path / "set")
    assert sorted((p.relative_to(tmp_path), p.read_bytes()) for p in (tmp_path / "set").rglob("*") if p.is_file()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["labelling", "set"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="other things"):
        ls.export_set(labelling, tmp_path / "mine")
    with pytest.raises(InputError, match="reviewers"):
        ls.export_set(labelling, tmp_path / "new", reviewers=["Nobody"])


def test_a_case_from_a_dicom_series_becomes_a_segmentation_of_it(tmp_path):
    made = lb.open_labelling(tmp_path / "labelling", lb.LabellingSettings(methods=("cf",), size_px=5, spacing_mm=None, dilate_mm=0.0, pad_slices=1))
    miniature_dicom.series(tmp_path / "ct", n=6)
    ct = read(tmp_path / "ct")
    mask = np.zeros(ct.shape, bool)
    mask[2:4, 1:4, 2:4] = True
    core = mask.copy()
    core[:, 1] = False
    lb.add_case(made, "series", ct, [mask, mask, core, mask])
    lb.add_case(made, "nifti", ct.with_array(ct.array, meta={}), [mask, mask, core, mask])
    table = lb.make_candidates(made, progress=False)
    assert set(table.status) == {"computed"}, table.reason.tolist()
    log = d.open_decisions(made)
    for name in made.cases():
        d.choose(log, "Ada", lb.read_case(made, name), "cf")
    table = ls.export_set(made, tmp_path / "set", dicom=True).set_index("case")
    assert table.accepted.all() and table.dicom.to_dict() == {"series": "alpha.dcm", "nifti": "not from a DICOM series"}
    back = read(tmp_path / "set" / "series" / "alpha.dcm")
    alpha = lb.read_case(made, "series").candidates["cf"]
    assert np.asarray(back).sum() == pytest.approx(alpha.array.sum(), abs=alpha.array.size / 510)
