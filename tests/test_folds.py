"""Folds: nobody is on both sides, everybody is judged, the published lists."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmatting import folds as fo
from medmatting.brain_growth import load
from medmatting.checks import InputError
from medmatting.lidc import shapes

PATIENTS = st.lists(st.integers(0, 40), min_size=40, max_size=200).map(lambda ids: {f"c{i}": f"p{p}" for i, p in enumerate([*range(20), *ids, *range(20)])})


def apart(fold, patients):
    "No patient in two parts, counted without the package's own check."
    groups = [{patients[case] for case in part} for part in (fold.train, fold.validation, fold.test)]
    return not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


@given(PATIENTS, st.integers(2, 5), st.integers(0, 9))
@settings(max_examples=50)
def test_cross_validation_judges_each_case_once_and_leaks_nothing(patients, folds, seed):
    made = fo.cross_validation(patients, folds, seed)
    assert len(made) == folds and all(apart(fold, patients) for fold in made)
    assert sorted(case for fold in made for case in fold.test) == sorted(patients)
    assert all(set(fold.train) | set(fold.test) == set(patients) and not fold.validation for fold in made)
    sizes = [len({patients[c] for c in fold.test}) for fold in made]
    assert max(sizes) - min(sizes) <= 1


@given(PATIENTS, st.integers(0, 9))
@settings(max_examples=50)
def test_repeated_splits_leak_nothing_and_lose_nobody(patients, seed):
    made = fo.repeated_splits(patients, seed=seed)
    assert len(made) == 4 and all(apart(fold, patients) for fold in made)
    assert all(sorted(fold.train + fold.validation + fold.test) == sorted(patients) for fold in made)
    assert len({fold.test for fold in made}) > 1 and made == fo.repeated_splits(patients, seed=seed)


def test_the_ratios_are_seven_to_one_to_two():
    patients = {f"c{i}": f"p{i:03d}" for i in range(100)}
    for fold in fo.repeated_splits(patients):
        assert (len(fold.train), len(fold.validation), len(fold.test)) == (70, 10, 20)


def test_all_nodules_of_a_patient_stay_together():
    patients = {str(i): p for i, p in shapes().patient_id.items()}
    assert len(set(patients.values())) == 554 < len(patients)
    for fold in fo.cross_validation(patients) + fo.repeated_splits(patients):
        assert apart(fold, patients)


def test_the_order_of_the_cases_does_not_decide_the_folds():
    patients = {f"c{i}": f"p{i % 9}" for i in range(40)}
    turned = dict(reversed(patients.items()))
    assert [set(f.test) for f in fo.cross_validation(patients)] == [set(f.test) for f in fo.cross_validation(turned)]


def test_brain_growth_has_the_published_lists():
    made = fo.brain_growth_folds()
    first = "case20 case10 case15 case01 case03 case30 case14 case36 case18 case31".split()
    assert set(made[0].test) == set(first) and [len(f.test) for f in made] == [10, 10, 10, 9]
    assert sorted(case for fold in made for case in fold.test) == [f"case{n:02d}" for n in range(1, 40)]
    assert made == fo.cross_validation({case: case for case in sorted(made[0].train + made[0].test)}), "seed 2, four parts"


def test_brain_growth_folds_name_its_cases(brain_growth_dir):
    names = {case.name for case in load(brain_growth_dir)}
    assert all(set(fold.train) | set(fold.test) == names for fold in fo.brain_growth_folds())


TWO = {"a1": "Ada", "a2": "Ada", "b1": "Ben", "b2": "Ben"}


@pytest.mark.parametrize("fold, word", [
    (fo.Fold("fold 7", ("a1", "b1"), ("a2", "b2")), "Ada in train and test"),
    (fo.Fold("fold 7", ("a1", "a2"), ("b1", "b1")), "case b1"),
    (fo.Fold("fold 7", ("a1", "a2"), ("b1",)), "only b1 in test"),
    (fo.Fold("fold 7", ("b1",), ("a1", "a2")), "only b1 in train"),
    (fo.Fold("fold 7", (), ("a1", "a2")), "no case in train"),
    (fo.Fold("fold 7", ("a1", "a2"), ("b1", "c1")), "'c1'"),
    (fo.Fold("fold 7", ("a1", "a2"), ("b1", "b2"), ("b2",)), "only b2 in validation"),
])  # fmt: skip
def test_a_bad_fold_is_refused_by_name(fold, word):
    with pytest.raises(InputError, match=f"^fold 7: .*{word}"):
        fo.check_fold(fold, TWO)


def test_a_good_fold_is_returned():
    fold = fo.Fold("fold 7", ("a1", "a2"), ("b1", "b2"))
    assert fo.check_fold(fold, TWO) is fold


@pytest.mark.parametrize("call, name", [
    (lambda: fo.cross_validation({"a": "Ada", "b": "Ben", "c": "Cleo"}, folds=3), "fold 0"),
    (lambda: fo.cross_validation(TWO, folds=3), "folds"), (lambda: fo.cross_validation(TWO, folds=1), "folds"),
    (lambda: fo.cross_validation({}), "patients"), (lambda: fo.cross_validation(["a"]), "patients"), (lambda: fo.cross_validation({"a": 1}), "patients"),
    (lambda: fo.cross_validation({"a": "Ada", "b": "Ada"}), "patients"),
    (lambda: fo.repeated_splits(TWO), "split 0"), (lambda: fo.repeated_splits(TWO, (7, 3)), "ratios"),
    (lambda: fo.repeated_splits(TWO, (7, 0, 2)), "ratios"), (lambda: fo.repeated_splits(TWO, repeats=0), "repeats"),
])  # fmt: skip
def test_bad_input_is_refused_by_name(call, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        call()
