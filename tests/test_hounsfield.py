"""Hounsfield units: windows, the solving range, Eq. 4 against its literal form, bad input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmatting.checks import InputError
from medmatting.hounsfield import LUNG, MEDIASTINUM, Window, calibrate, check_hu, solving_range
from medmatting.volumes import Volume

HU = np.array([-3024, -1350, -1000, -850, -600, -160, 0, 30, 40, 150, 151, 240, 400, 3000], np.int16)


def literal(hu, window, l_low, l_high, q, p):
    "Eq. 4, voxel by voxel."
    return np.array([p(x) if x > l_high else q(x) if x < l_low else 1.0 for x in map(float, hu)])


@pytest.mark.parametrize("window", [LUNG, MEDIASTINUM, Window(-300, 80.5)])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_defaults_are_the_literal_equation(window, dtype):
    low = window.centre + window.width / 2
    q = lambda x: max(0.0, (x - (low - window.width)) / window.width)
    result = calibrate(HU.astype(dtype), window)
    assert result.dtype == np.float32
    assert np.allclose(result, literal(HU, window, low, np.inf, q, None), atol=1e-6)


@pytest.mark.parametrize("hu, lung, mediastinum", [(30, 0.92, 0.475), (-600, 0.5, 0), (-850, 1 / 3, 0), (150, 1, 0.775)])
def test_known_values_of_the_presets(hu, lung, mediastinum):
    assert calibrate(np.array([hu]))[0] == pytest.approx(lung, abs=1e-6)
    assert calibrate(np.array([hu]), MEDIASTINUM)[0] == pytest.approx(mediastinum, abs=1e-6)


def test_own_limits_and_functions_are_the_literal_equation():
    q, p = lambda x: np.clip((x + 900) / 1500, 0, 0.4), lambda x: 1 / (1 + (x - 200) / 100)
    for low, high in ((-100, 200), (-160, 240)):  # the second pair are values that occur: both count as pure lesion
        result = calibrate(HU, MEDIASTINUM, l_low=low, l_high=high, q=q, p=p)
        assert np.allclose(result, literal(HU, MEDIASTINUM, low, high, q, p), atol=1e-6)


def test_own_l_low_keeps_q_continuous():
    assert calibrate(np.array([-300.0, -300.1, -1050.0]), LUNG, l_low=-300) == pytest.approx([1, 0.99993, 0.5], abs=1e-4)


@given(st.lists(st.floats(-3000, 3000), min_size=2, max_size=30), st.floats(-900, 300), st.floats(1, 3000))
def test_calibration_rises_with_hu(values, centre, width):
    hu = np.sort(np.array([*values, -5000.0]))
    result = calibrate(hu, Window(centre, width))
    assert (np.diff(result) >= 0).all() and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("arguments, words", [
    (dict(q=lambda x: np.clip(-x / 1000, 0, 1)), "rises with HU"),
    (dict(q=lambda x: x / 1000), r"into \[0, 1\]"),
    (dict(q=lambda x: x * np.nan), r"into \[0, 1\]"),
    (dict(q=lambda x: 0.5), "one number for each"),
    (dict(l_high=300), "p"),
    (dict(p=lambda x: x * 0), "p"),
    (dict(l_high=300, p=lambda x: np.clip(x / 4000, 0, 1)), "falls with HU"),
    (dict(l_low=100, l_high=50, p=lambda x: x * 0), "l_low, l_high"),
    (dict(l_low=np.nan), "l_low, l_high"),
    (dict(window=(-600, 1500)), "window"),
])
def test_bad_settings_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        calibrate(HU, **arguments)


def test_a_monotone_function_with_a_flaw_at_one_value_is_found():
    q = lambda x: np.where(x == -850, 0.9, np.clip((x + 1350) / 1500, 0, 1))
    with pytest.raises(InputError, match="-600 HU"):
        calibrate(HU, q=q)
    calibrate(HU[HU != -850], q=q)  # nothing is wrong on the values that occur


@pytest.mark.parametrize("function", [calibrate, solving_range, check_hu, LUNG.apply])
@pytest.mark.parametrize("bad, words", [
    (HU.astype(np.uint8), "uint8"), (HU.astype(np.uint16), "uint16"), (HU > 0, "bool"),
    (np.linspace(0, 1, 9), "already"), (np.array([0.0, np.nan]), "NaN"), (np.array([0.0, -np.inf]), "infinite"),
    (Volume(np.zeros((2, 2)), unit="SUV"), "SUV"), (np.array(["a"]), "Hounsfield"),
])
def test_what_is_not_hu_is_refused(function, bad, words):
    with pytest.raises(InputError, match=words):
        function(bad)


def test_solving_range_clips_and_scales():
    assert np.array_equal(solving_range(HU, (-1000, 400)), np.float32((np.clip(HU.astype(float), -1000, 400) + 1000) / 1400))
    assert solving_range(HU.astype(float)).dtype == np.float64


@pytest.mark.parametrize("bad", [(400, -1000), (0, 0), (0, np.inf), (0,), 5, "ab", None, (np.nan, 1)])
def test_bad_ranges_are_refused(bad):
    with pytest.raises(InputError, match="hu_range"):
        solving_range(HU, bad)


@pytest.mark.parametrize("bad", [(0, 0), (0, -5), (np.nan, 100), (0, np.inf), ("a", 3)])
def test_bad_windows_are_refused(bad):
    with pytest.raises(InputError, match="window"):
        Window(*bad)


def test_volumes_stay_volumes_and_nothing_is_changed():
    array = np.tile(HU, (2, 1))
    array.flags.writeable = False
    volume = Volume(array, (2.0, 0.5), unit="HU")
    for result in (calibrate(volume), solving_range(volume), LUNG.apply(volume)):
        assert (result.spacing, result.unit, result.array.dtype) == ((2.0, 0.5), "", np.float32)
    assert calibrate(HU[:0]).shape == (0,)
