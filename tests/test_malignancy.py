"""Diagnosis: labels, inputs, classifiers, AUROC, one run and its restart."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from build import NBS
from hypothesis import given as for_all
from hypothesis import strategies as st
from scipy.stats import norm

from medmatting import malignancy, matte
from medmatting.auroc import Judged, auroc, compare, interval, mean_auroc, resampled
from medmatting.checks import InputError
from medmatting.classifiers import CLASSIFIERS, make_classifier
from medmatting.files import read, write
from medmatting.folds import Fold, repeated_splits
from medmatting.labelled_set import COLUMNS
from medmatting.lidc import shape, shapes
from medmatting.malignancy import (INPUTS, RULES, MalignancyRun, Voxels, archive_nodules, cube, find_archive, input_map, is_malignant, kept_inputs, logistic,
                                   nodule_inputs, simulated_nodules, train_classifier)  # fmt: skip
from medmatting.recipes_classification import ClassObjective, class_sample, probabilities, turned
from medmatting.registry import sha256_of
from medmatting.simnod_set import make_case, plan
from medmatting.train import Recipe, train
from medmatting.trimaps import trimap_from_raters
from medmatting.volumes import Volume

# ---- AUROC


@for_all(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(lambda rows: len({label for _, label in rows}) == 2))
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows):
    scores, labels = np.array([s for s, _ in rows], float), np.array([label for _, label in rows])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    judged = Judged(scores, labels, np.arange(len(rows)))
    assert auroc(judged) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert auroc(Judged(-scores, labels, np.arange(len(rows)))) == pytest.approx(1 - np.mean(pairs), abs=1e-12)
    assert auroc(Judged(np.exp(scores), labels, np.arange(len(rows)))) == pytest.approx(np.mean(pairs), abs=1e-12)  # only the order counts


def binormal(rng, apart, cases=70, patients=70):
    labels = rng.random(cases) < 0.5
    labels[:2] = True, False
    return Judged(apart * labels + rng.standard_normal(cases), labels, rng.integers(patients, size=cases))


def test_resampling_equals_repeating_the_cases_of_drawn_patients():
    judged = [binormal(np.random.default_rng(k), 1.0, 20, 9) for k in range(2)]
    judged = [replace(part, scores=np.round(part.scores)) for part in judged]  # with ties
    names = np.unique(np.concatenate([part.patients for part in judged]))
    drawn = np.random.default_rng(5).integers(len(names), size=(100, len(names)))
    for draw, value in zip(drawn, resampled(judged, draws=100, seed=5)):
        found = []
        for part in judged:
            rows = np.concatenate([np.flatnonzero(part.patients == names[k]) for k in draw])
            if len(set(part.labels[rows])) == 2:
                found.append(auroc(Judged(part.scores[rows], part.labels[rows], part.patients[rows])))
        assert value == pytest.approx(np.mean(found), abs=1e-12)


def test_intervals_hold_the_known_answer():
    truth, rng = norm.cdf(1 / np.sqrt(2)), np.random.default_rng(1)
    hits = [low <= truth <= high for low, high in (interval([binormal(rng, 1.0, 70, 10**9)], draws=300) for _ in range(150))]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_a_difference_is_paired_and_has_a_sign():
    rng = np.random.default_rng(0)
    one = [binormal(rng, 2.0)]
    same = [replace(one[0], scores=one[0].scores + 1e-9)]
    worse = [replace(one[0], scores=rng.standard_normal(70))]
    assert compare(one, same).value == 0 and compare(one, same).p == 1 and compare(one, same).low == compare(one, same).high == 0
    gap, back = compare(one, worse), compare(worse, one)
    assert gap.value == -back.value == mean_auroc(one) - mean_auroc(worse) and gap.low > 0 > back.high and gap.p < 0.01
    with pytest.raises(InputError, match="other cases"):
        compare(one, [binormal(rng, 1.0)])


@pytest.mark.parametrize("wrong", [([1, 2], [True, True]), ([1, np.nan], [True, False]), ([1, 2], [1, 0]), ([1, 2, 3], [True, False])])
def test_what_has_no_auroc_is_refused(wrong):
    with pytest.raises(InputError):
        Judged(wrong[0], np.array(wrong[1]), list("ab"))


# ---- labels and splits


def test_the_label_rule_and_its_alternatives():
    rule = {text: [is_malignant(text, name) for name in RULES] for text in ("1 2 3 2", "3 3 3 3", "2 4 3 3", "5 5 1 3", "1 3 3 3", "4 ? 5", "?")}
    assert list(RULES) == ["mean", "median", "3 malignant", "3 benign"]
    assert rule == {"1 2 3 2": [False] * 4, "3 3 3 3": [None, None, True, False], "2 4 3 3": [None, None, True, False], "5 5 1 3": [True] * 4,
                    "1 3 3 3": [False, None, False, False], "4 ? 5": [True] * 4, "?": [None] * 4}  # fmt: skip
    for wrong in (lambda: is_malignant("0 3 3 3"), lambda: is_malignant("3 3", "biopsy")):
        with pytest.raises(InputError):
            wrong()


def test_counts_on_the_nodules_of_four_readers():
    found = [is_malignant(text) for text in shapes().malignancy]
    assert (found.count(False), found.count(True), found.count(None)) == (386, 392, 119)


def test_splits_keep_patients_together():
    nodules = simulated_nodules(200)
    patients = {n.name: n.patient for n in nodules}
    assert len(set(patients.values())) < len(nodules)  # some have several, so there is something to keep together
    for fold in repeated_splits(patients):
        parts = [{patients[case] for case in part} for part in (fold.train, fold.validation, fold.test)]
        assert not (parts[0] & parts[2] or parts[0] & parts[1] or parts[1] & parts[2])


def test_simulated_nodules_know_texture_and_margin_and_nothing_of_malignancy(monkeypatch):
    planned = plan(1)[0]
    plain = make_case(planned)

    def rated(**ratings):
        real = shape(planned.index)
        monkeypatch.setattr("medmatting.simnod_set.shape", lambda index: replace(real, about={**real.about, **ratings}))
        return make_case(planned)

    other = rated(malignancy="1 1 1 1", spiculation="1 1 1 1", lobulation="1 1 1 1")
    assert np.array_equal(other.ct.array, plain.ct.array) and np.array_equal(other.alpha, plain.alpha)
    assert not np.array_equal(rated(margin="1 1 1 1").alpha, plain.alpha)
    assert not np.array_equal(make_case(replace(planned, texture="ground glass")).alpha, plain.alpha)


# ---- inputs


def small_voxels(seed=0, side=14):
    "A soft ball in noise with four readers."
    random, axes = np.random.default_rng(seed), np.ogrid[tuple(slice(-(side - 1) / 2, side / 2) for _ in range(3))]
    distance = np.sqrt(sum(axis**2 for axis in axes))
    alpha = np.clip((4.5 - distance) / 3, 0, 1).astype(np.float32)
    masks = np.stack([distance < 3 + d for d in (-1, 0, 0.5, 1)])
    ct = Volume((alpha * 900 - 870 + random.normal(0, 15, alpha.shape)).astype(np.float32), 0.5, unit="HU")
    return Voxels(ct, masks, trimap_from_raters(masks, 0.5, spacing=0.5, vanishing="keep"), alpha)


def test_each_input_is_what_its_name_says():
    voxels = small_voxels()
    found = {name: input_map(name, voxels, "n1") for name in INPUTS}
    assert len(INPUTS) == 14 and all(image.dtype == np.float32 for image in found.values())
    np.testing.assert_allclose(found["ct"], (np.clip(voxels.ct.array, -1000, 400) + 1000) / 1400, atol=1e-6)
    np.testing.assert_array_equal(found["mean"], voxels.masks.sum(0) / np.float32(4))
    np.testing.assert_array_equal(found["overlap"], np.logical_and.reduce(voxels.masks))
    np.testing.assert_array_equal(found["union"], np.logical_or.reduce(voxels.masks))
    np.testing.assert_array_equal(found["gt"], voxels.alpha)
    assert any(np.array_equal(found["random"], mask) for mask in voxels.masks)
    assert len({input_map("random", voxels, f"n{k}").sum() for k in range(20)}) > 1  # not always the same reader
    for method in ("cf", "knn", "lb", "if"):
        np.testing.assert_array_equal(found[method], np.asarray(matte(voxels.ct, voxels.trimap, method)))
        np.testing.assert_array_equal(found[f"{method}_plus"], np.asarray(matte(voxels.ct, voxels.trimap, f"{method}+")))
    for name, case in (("ct+", voxels), ("gt", voxels._replace(alpha=None))):
        with pytest.raises(InputError):
            input_map(name, case, "n1")


def test_a_cube_is_cut_around_its_centre_and_padded_beyond_the_volume():
    array = np.arange(6 * 7 * 8, dtype=float).reshape(6, 7, 8)
    assert np.array_equal(cube(array, (2.5, 3, 3.5), 4), array[1:5, 2:6, 2:6]) or np.array_equal(cube(array, (2.5, 3, 3.5), 4), array[1:5, 1:5, 2:6])
    wide = cube(array, (2.5, 3, 3.5), 12)
    assert wide.sum() == array.sum() and wide.shape == (12,) * 3
    assert cube(array, (2.5, 3, 3.5), 12, border="edge")[0, 0, 0] == array[0, 0, 0]
    pooled = cube(np.ones((4, 4, 4)) * (np.arange(4) // 2)[:, None, None], (1.5, 1.5, 1.5), 4, 2)
    assert pooled.tolist() == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    with pytest.raises(InputError):
        cube(array, (2, 2, 2), 6, 4)


def test_inputs_are_kept_and_made_again_when_they_are_not_whole(tmp_path, monkeypatch):
    nodule, names = simulated_nodules(1)[0], ["mean", "gt"]
    made = nodule_inputs(nodule, names)
    first = kept_inputs(nodule, names, 64, 2, tmp_path)
    assert all(np.abs(first[name] - made[name]).max() <= 0.5 / 65535 + 1e-7 for name in names)
    path = tmp_path / f"{nodule.name}.npz"
    with monkeypatch.context() as patch:
        patch.setattr(malignancy, "nodule_inputs", None)  # may not be called
        assert all(np.array_equal(kept_inputs(nodule, names, 64, 2, tmp_path)[name], first[name]) for name in names)
    path.write_bytes(path.read_bytes()[:-200])
    assert np.array_equal(kept_inputs(nodule, names, 64, 2, tmp_path)["gt"], first["gt"])
    assert list(kept_inputs(nodule, names, 64, 2, tmp_path, ["gt"])) == ["gt"] and kept_inputs(nodule, names, 64, 2, tmp_path, []) == {}
    assert kept_inputs(nodule, names, 64, 1, tmp_path)["gt"].shape == (64,) * 3


# ---- a converted archive


def write_archive(folder, kept, left_out=0, labelled=()):
    "What `medmatting data lidc` leaves for some nodules, one for each patient, and a labelled set of some of them."
    name = lambda k: f"P{k:02d}_nodule1"
    rows = [dict(nodule=name(k), patient=f"P{k:02d}", diameter_mm=6.0 + 0.1 * k, malignancy="4 5 ? 4" if k % 2 else "1 2 2 1", texture=f"5 5 5 {1 + k % 5}",
                 margin=f"4 4 4 {1 + k % 4}", spiculation="1 1 1 1", status="kept" if k < kept else "left out") for k in range(kept + left_out)]  # fmt: skip
    for k in range(kept):
        voxels, place = small_voxels(k), folder / "lidc" / "cases" / name(k)
        write(place / "image.nii.gz", voxels.ct)
        write(place / "trimap.nii.gz", voxels.ct.with_array(voxels.trimap, unit=""))
        for r, mask in enumerate(voxels.masks, 1):
            write(place / f"rater{r}.nii.gz", voxels.ct.with_array(mask.astype(np.uint8), unit=""))
    pd.DataFrame(rows).to_csv(folder / "lidc" / "nodules.csv", index=False)
    lines = []
    for k in labelled:
        voxels, place = small_voxels(k), folder / "set" / name(k)
        for part, array in (("image", voxels.ct.array), ("alpha", voxels.alpha), ("trimap", voxels.trimap)):
            write(place / f"{part}.nii.gz", voxels.ct.with_array(array, unit=""))
        lines.append(dict.fromkeys(COLUMNS, "") | dict(case=name(k), accepted=True, method="cf+", raters=0, alpha_sha256=sha256_of(place / "alpha.nii.gz")))
    pd.DataFrame(lines, columns=COLUMNS).to_csv(folder / "set" / "cases.csv", index=False)


@pytest.fixture
def archive(tmp_path):
    "Two nodules, a third that was left out, and a label for the second."
    write_archive(tmp_path, 2, 1, [1])
    return tmp_path


def test_a_converted_archive_gives_the_same_inputs(archive):
    plain = archive_nodules(archive / "lidc")
    assert [(n.name, n.patient, is_malignant(n.ratings["malignancy"])) for n in plain] == [("P00_nodule1", "P00", False), ("P01_nodule1", "P01", True)]
    assert plain[0].volume_mm3 == pytest.approx(4 / 3 * np.pi * 27)
    (labelled,) = archive_nodules(archive / "lidc", archive / "set")
    voxels, expected = labelled.voxels(), small_voxels(1)
    assert labelled.name == "P01_nodule1" and np.array_equal(voxels.masks, expected.masks) and np.array_equal(voxels.trimap, expected.trimap)
    np.testing.assert_allclose(voxels.alpha, expected.alpha, atol=1e-5)
    for name in ("ct", "union", "cf_plus"):
        np.testing.assert_allclose(input_map(name, voxels, "P1"), input_map(name, expected, "P1"), atol=2e-3)
    made = nodule_inputs(labelled, ["union", "ct", "gt"], side=32, pool=1)
    assert made["union"].shape == (32,) * 3 and made["union"].sum() == expected.masks.any(0).sum()  # nothing of the nodule is cut off
    middle = [np.flatnonzero(made["union"].any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    assert all(abs(places[0] + places[-1] - 31) <= 1 for places in middle)
    with pytest.raises(InputError, match="gt"):
        nodule_inputs(plain[0], ["gt"], side=32, pool=1)


def test_inputs_of_another_archive_or_truth_are_not_taken_for_these(archive, tmp_path):
    write_archive(tmp_path / "other", 2, 1, [1])
    alpha = tmp_path / "other" / "set" / "P01_nodule1" / "alpha.nii.gz"
    write(alpha, read(alpha).with_array(read(alpha).array / 2))
    table = pd.read_csv(tmp_path / "other" / "set" / "cases.csv", keep_default_na=False)
    table.assign(alpha_sha256=sha256_of(alpha)).to_csv(tmp_path / "other" / "set" / "cases.csv", index=False)
    sets = [(archive / "lidc", archive / "set"), (archive / "lidc", tmp_path / "other" / "set"), (tmp_path / "other" / "lidc", archive / "set")]
    nodules = [archive_nodules(*places)[0] for places in sets]
    assert len({n.name for n in nodules}) == 1 and len({n.source for n in nodules}) == 3
    assert archive_nodules(*sets[0])[0].source == nodules[0].source
    true = [kept_inputs(n, ["gt"], 32, 1, tmp_path / "kept")["gt"] for n in nodules]
    np.testing.assert_allclose(true[1], true[0] / 2, atol=1e-4)


def test_the_archive_is_found_in_the_data_folder_by_its_names(archive):
    assert find_archive(archive) == (None, None)
    (archive / "lidc").rename(archive / "lidc_cases")
    assert find_archive(archive) == (archive / "lidc_cases", None)
    (archive / "set").rename(archive / "lidc_labelled")
    assert find_archive(archive) == (archive / "lidc_cases", archive / "lidc_labelled")


def test_with_lidc_the_notebook_is_the_experiment(tmp_path, monkeypatch):
    write_archive(tmp_path, 20, labelled=range(20))
    (tmp_path / "lidc").rename(tmp_path / "lidc_cases")
    (tmp_path / "set").rename(tmp_path / "lidc_labelled")
    monkeypatch.setenv("MEDMATTING_DATA", str(tmp_path))
    values = dict(out_dir=str(tmp_path), profile="full", side=32, pool=1, inputs=["mean", "gt"], seeds=[0, 1],
                  steps=2, warmup=1, batch=4, resamples=100, device="cpu", runs_dir=str(tmp_path / "runs"))  # fmt: skip
    papermill.execute_notebook(NBS / "experiments" / "malignancy.ipynb", tmp_path / "done.ipynb", values, progress_bar=False)
    measures = pd.read_csv(tmp_path / "measures.csv").set_index("measure")
    assert {"td.f5.resnet34.mean.auroc", "td.f5.resnet34.gt.auroc"} <= set(measures.index) and (measures.data == "lidc_idri").all()
    cases = pd.read_csv(tmp_path / "cases.csv")
    assert cases.patient.str.fullmatch(r"P\d\d").all() and set(cases.input) == {"mean", "gt"} and cases.probability.between(0, 1).all()
    assert "taken: lidc_cases, true mattes of lidc_labelled" in (tmp_path / "done.ipynb").read_text()
    assert "simulated" not in "".join((tmp_path / f"{name}.md").read_text() for name in ("auroc", "labels", "orderings", "ratings"))


def test_a_folder_that_is_no_archive_is_refused(archive):
    with pytest.raises(InputError, match="nodules.csv"):
        archive_nodules(archive)
    table = pd.read_csv(archive / "lidc" / "nodules.csv").assign(status="left out")
    table.to_csv(archive / "lidc" / "nodules.csv", index=False)
    with pytest.raises(InputError, match="kept"):
        archive_nodules(archive / "lidc")


# ---- classifiers


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_learns_four_cases_by_heart(kind, tmp_path):
    random = np.random.default_rng(0)
    blocks = lambda: random.random((4, 4, 4)).repeat(8, 0).repeat(8, 1).repeat(8, 2)
    samples = [class_sample(f"case{k}", blocks(), bool(k % 2)) for k in range(4)]
    objective = ClassObjective(make_classifier(kind, "small"))
    history = train(objective, samples, Recipe(steps=40, batch=4, rate=1e-2), tmp_path, progress=False)
    assert history[-1]["loss"] < 0.2 < history[0]["loss"] and history[-1]["correct"] == 1


def test_classifiers_are_of_their_seed_and_leave_random_numbers_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    weights = [make_classifier("resnet34", "small", seed).body.fc.weight for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_wrong_volumes_are_refused(kind):
    net = make_classifier(kind, "small")
    for image in (torch.rand(2, 2, 32, 32, 32), torch.rand(2, 1, 32, 32, 31), torch.rand(1, 1, 32, 32, 32), torch.rand(32, 32, 32)):
        with pytest.raises(InputError):
            net(image)
    with pytest.raises(InputError, match="resnet18"):
        make_classifier("resnet18")


def test_augmentation_keeps_the_voxels_and_moves_them():
    sample = class_sample("a", np.random.default_rng(0).random((4, 6, 6)), True)
    views = [turned(sample, torch.Generator().manual_seed(seed))["image"] for seed in range(100)]
    assert len({view.numpy().tobytes() for view in views}) == 16
    assert all(torch.equal(view.flatten().sort().values, sample["image"].flatten().sort().values) for view in views)


def test_samples_that_are_not_in_order_are_refused():
    for image, label in ((np.zeros((4, 4, 5)), True), (np.full((4, 4, 4), 2.0), True), (np.full((4, 4, 4), np.nan), True), (np.zeros((4, 4, 4)), None)):
        with pytest.raises(InputError):
            class_sample("a", image, label)


# ---- a run


@pytest.fixture
def nodules():
    random = np.random.default_rng(0)
    samples = {f"n{k}": class_sample(f"n{k}", random.random((32, 32, 32)) * 0.5 + 0.4 * (k % 2), bool(k % 2)) for k in range(6)}
    return samples, Fold("split 0", ("n0", "n1", "n2", "n3"), ("n4", "n5"))


def test_a_killed_run_ends_as_if_it_had_not_been(nodules, tmp_path, monkeypatch):
    samples, fold = nodules
    run = MalignancyRun("resnet34", "small", "ct", fold.name, Recipe(steps=55, batch=2, rate=1e-3))
    whole = train_classifier(run, fold, samples, tmp_path / "whole", progress=False)
    calls, forward = [], ClassObjective.forward

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) == 53:  # after the checkpoint at step 50
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ClassObjective, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_classifier(run, fold, samples, tmp_path / "broken", progress=False)
    assert not (tmp_path / "broken" / "predictions.csv").exists()
    pd.testing.assert_frame_equal(train_classifier(run, fold, samples, tmp_path / "broken", progress=False), whole, check_exact=True)
    assert list(whole.case) == ["n4", "n5"] and whole.label.tolist() == [False, True]
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["input"] == "ct" and record["recipe"]["steps"] == 55
    for change, fields in (({"input": "gt"}, samples), ({}, samples | {"n4": samples["n5"]})):
        with pytest.raises(InputError, match="another run"):
            train_classifier(replace(run, **change), fold, fields, tmp_path / "whole")


def test_a_network_that_does_not_exist_claims_no_folder(nodules, tmp_path):
    samples, fold = nodules
    for change in ({"kind": "resnet18"}, {"size": "tiny"}):
        with pytest.raises(InputError):
            train_classifier(replace(MalignancyRun("resnet34", "small", "ct", fold.name, Recipe(steps=1, batch=2)), **change), fold, samples, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_probabilities_do_not_depend_on_the_batch(nodules):
    samples, net = list(nodules[0].values()), make_classifier("resnet34", "small")
    np.testing.assert_allclose(probabilities(net, samples, 4), probabilities(net, samples, 1), atol=1e-6)


def test_logistic_regression_finds_the_weights_of_its_model():
    random = np.random.default_rng(0)
    known = random.normal(5, [1, 3], (4000, 2))
    odds = 2 * (known[:, 0] - 5) - 0.5 * (known[:, 1] - 5)
    labels = random.random(4000) < 1 / (1 + np.exp(-odds))
    said = logistic(known, labels, np.array([[5.0, 5.0], [6.0, 5.0], [5.0, 6.0]]), ridge=0)
    np.testing.assert_allclose([said[0], said[1] - said[0], said[2] - said[0]], [0, 2, -0.5], atol=0.2)
    with pytest.raises(InputError):
        logistic(np.ones((4, 1)), labels[:4], np.ones((1, 1)))
