"""Entropy, pseudo ground truth and calibration, against literal formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmatting import uncertainty as un
from medmatting.checks import InputError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("base", [2, math.e, 10])
def test_entropy_equals_the_literal_double_loop(classes, base):
    maps = torch.randn(4, 2, classes, 3, 2, generator=generator()).mul(3).softmax(2)
    u = un.uncertainty_map(maps, base)
    for b, y, x in np.ndindex(2, 3, 2):
        total = 0.0
        for c in range(classes):
            p = sum(float(maps[n, b, c, y, x]) for n in range(4)) / 4
            total -= p * math.log(p) / math.log(base)
        assert math.isclose(u[b, 0, y, x], total, abs_tol=1e-6)


@given(st.integers(2, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_entropy_is_largest_for_equal_classes(classes, seed):
    p = torch.rand(1, classes, 4, 4, generator=generator(seed)).softmax(1)
    u = un.entropy(p, base=2)
    assert (u >= 0).all() and (u <= math.log2(classes) + 1e-5).all()
    assert torch.allclose(un.entropy(torch.full((1, classes, 1, 1), 1 / classes)), torch.tensor(math.log2(classes)))


def test_a_certain_pixel_has_no_entropy_and_a_finite_gradient():
    p = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).requires_grad_()
    u = un.entropy(p)
    assert u == 0 and torch.autograd.grad(u.sum(), p)[0].isfinite().all()
    logit = torch.tensor(200.0, requires_grad=True)  # its sigmoid is exactly 1
    certain = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)]).reshape(1, 2, 1, 1)
    assert torch.autograd.grad(un.entropy(certain).sum(), logit)[0].isfinite()


def test_contradicting_certain_draws_are_uncertain():
    draw = torch.zeros(2, 1, 2, 1, 1)
    draw[0, 0, 0] = draw[1, 0, 1] = 1
    assert un.uncertainty_map(draw) == 1


def test_thresholds_are_uniform_between_their_limits():
    ramp = torch.linspace(0.1, 0.9, 1001).reshape(1, 1, 7, 143).expand(4000, -1, -1, -1)
    masks = un.masks_from_thresholds(ramp, generator())
    cuts = 0.9 - 0.8 * masks.mean((1, 2, 3))
    assert set(masks.unique().tolist()) == {0, 1}
    assert abs(cuts.min() - (0.1 + 0.2 * 0.8)) < 0.005 and abs(cuts.max() - (0.1 + 0.7 * 0.8)) < 0.005
    assert abs(cuts.mean() - (0.1 + 0.45 * 0.8)) < 0.01 and abs(cuts.std() - 0.4 / 12**0.5) < 0.01


@pytest.mark.parametrize("value", [0.0, 0.4, 0.6, 1.0])
def test_a_constant_matte_is_cut_at_one_half(value):
    mask = un.masks_from_thresholds(torch.full((2, 1, 3, 3), value))
    assert (mask == float(value >= 0.5)).all()


def test_raters_are_chosen_for_each_image_and_all_of_them():
    masks = torch.arange(5.0).reshape(1, 5, 1, 1).expand(500, -1, 3, 3) + 10 * torch.arange(500).reshape(-1, 1, 1, 1)
    chosen = un.masks_from_raters(masks, generator())
    assert chosen.shape == (500, 1, 3, 3)
    raters = chosen[:, 0, 0, 0] - 10 * torch.arange(500)
    assert torch.bincount(raters.long(), minlength=5).min() > 60 and (raters < 5).all()


@pytest.mark.parametrize("function, values", [(un.masks_from_thresholds, torch.rand(6, 1, 5, 5)), (un.masks_from_raters, torch.rand(6, 4, 5, 5))])
def test_masks_repeat_with_their_seed(function, values):
    assert torch.equal(function(values, generator(1)), function(values, generator(1)))
    assert not torch.equal(function(values, generator(1)), function(values, generator(2)))


def test_calibration_equals_the_literal_loop():
    rng = np.random.default_rng(0)
    u = rng.random((20, 30))
    e = np.abs(u * rng.random((20, 30)))
    found = un.calibration(u, e, bins=5)
    for k in range(5):
        inside = [(a, b) for a, b in zip(u.flat, e.flat) if k * u.max() / 5 <= a < (k + 1) * u.max() / 5 or (k == 4 and a == u.max())]
        assert found.count[k] == len(inside)
        assert np.allclose([found.uncertainty[k], found.error[k]], np.mean(inside, 0))
    from scipy.stats import spearmanr

    assert np.isclose(found.rank_correlation, spearmanr(u.ravel(), e.ravel()).statistic)


def test_calibration_of_a_constant_has_no_correlation():
    found = un.calibration(np.zeros((3, 3)), np.ones((3, 3)))
    assert np.isnan(found.rank_correlation) and found.count.sum() == 9 and found.error[0] == 1


@pytest.mark.parametrize("call, name", [
    (lambda: un.uncertainty_map(torch.rand(2, 1, 3, 3)), "score_maps"), (lambda: un.uncertainty_map(torch.rand(2, 1, 1, 3, 3)), "score_maps"),
    (lambda: un.entropy(torch.rand(1, 2, 3, 3), base=float("nan")), "base"), (lambda: un.masks_from_thresholds(torch.rand(3, 3)), "alpha"),
    (lambda: un.masks_from_thresholds(torch.ones(1, 1, 3, 3, dtype=torch.uint8)), "alpha"),
    (lambda: un.masks_from_thresholds(torch.rand(1, 1, 3, 3), low=0.7, high=0.2), "low and high"),
    (lambda: un.masks_from_raters(torch.rand(1, 0, 3, 3)), "masks"), (lambda: un.calibration(np.ones(3), np.ones((3, 1))), "error"),
    (lambda: un.calibration(np.array([np.nan]), np.ones(1)), "uncertainty"), (lambda: un.calibration(np.ones(1), -np.ones(1)), "error"),
    (lambda: un.calibration(np.ones(2), np.ones(2), bins=0), "bins"),
])  # fmt: skip
def test_bad_input_is_refused_by_name(call, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        call()
