"""Losses and weightings, each against a literal loop."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from medmatting import losses
from medmatting.checks import InputError
from medmatting.probabilistic_unet import Gaussian, ProbabilisticUNet

torch.manual_seed(0)
NAN = torch.tensor(float("nan"))


def terms(**values):
    return {k: torch.tensor(float(v)) for k, v in {**dict(ce=0.3, kl=0.02, mae=0.1, grad=0.7), **values}.items()}


def test_cross_entropy_of_two_classes_is_the_literal_sum():
    logits, mask = torch.randn(2, 1, 3, 4), (torch.rand(2, 1, 3, 4) > 0.5).float()
    total = 0.0
    for z, m in zip(logits.flatten().tolist(), mask.flatten().tolist()):
        p = 1 / (1 + math.exp(-z))
        total -= m * math.log(p) + (1 - m) * math.log(1 - p)
    assert math.isclose(losses.cross_entropy(logits, mask), total / 24, rel_tol=1e-5)


def test_cross_entropy_of_three_classes_is_the_literal_sum():
    logits, label = torch.randn(2, 3, 2, 2), torch.randint(3, (2, 2, 2))
    mask = torch.nn.functional.one_hot(label, 3).permute(0, 3, 1, 2)
    total = 0.0
    for b, y, x in np.ndindex(2, 2, 2):
        exps = [math.exp(v) for v in logits[b, :, y, x].tolist()]
        total -= math.log(exps[label[b, y, x]] / sum(exps))
    assert math.isclose(losses.cross_entropy(logits, mask), total / 8, rel_tol=1e-5)


def test_absolute_difference_is_the_literal_mean():
    a, t = torch.rand(2, 1, 3, 4), torch.rand(2, 1, 3, 4)
    literal = sum(abs(x - y) for x, y in zip(a.flatten().tolist(), t.flatten().tolist())) / 24
    assert math.isclose(losses.absolute_difference(a, t), literal, rel_tol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (4, 5, 6)])
def test_sobel_is_scipys(size):
    x = torch.rand(2, 1, *size)
    found = losses.sobel(x)
    for b in range(2):
        for axis in range(len(size)):
            assert np.allclose(found[axis, b, 0], ndimage.sobel(x[b, 0].numpy(), axis, mode="nearest"), atol=1e-5)


def literal_gradient_difference(alpha, truth, region):
    "The double loop: for each image the mean over its region, then the mean over images."
    kernel = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]
    batch, _, height, width = alpha.shape
    total = 0.0
    for b in range(batch):
        inside, summed = 0, 0.0
        for y, x in np.ndindex(height, width):
            if not region[b, 0, y, x]:
                continue
            inside += 1
            for turned in (False, True):
                both = []
                for matte in (alpha, truth):
                    value = 0.0
                    for i, j in np.ndindex(3, 3):
                        yy, xx = min(max(y + i - 1, 0), height - 1), min(max(x + j - 1, 0), width - 1)
                        value += (kernel[j][i] if turned else kernel[i][j]) * float(matte[b, 0, yy, xx])
                    both.append(value)
                summed += abs(both[0] - both[1])
        total += summed / inside if inside else 0.0
    return total / batch


def test_gradient_difference_is_the_literal_loop():
    alpha, truth = torch.rand(3, 1, 5, 4), torch.rand(3, 1, 5, 4)
    region = torch.rand(3, 1, 5, 4) > 0.6
    region[1] = False
    assert region[0].any() and region[2].any()
    found = losses.gradient_difference(alpha, truth, region)
    assert math.isclose(found, literal_gradient_difference(alpha, truth, region), rel_tol=1e-5)


def test_an_empty_region_adds_nothing_and_trains_on():
    alpha = torch.rand(2, 1, 4, 4, requires_grad=True)
    found = losses.matting_terms(alpha, torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    assert found["grad"] == 0 and found["mae"] > 0
    gradient, = torch.autograd.grad(sum(found.values()), alpha)
    assert gradient.isfinite().all() and gradient.any()


def test_the_region_begins_at_the_threshold_and_has_no_gradient():
    u = torch.tensor([0.0, 0.0999, 0.1, 0.9], requires_grad=True).reshape(1, 1, 2, 2)
    assert losses.uncertain_region(u).flatten().tolist() == [False, False, True, True]
    assert not losses.uncertain_region(u).requires_grad


def test_segmentation_terms_are_those_of_the_output():
    net = ProbabilisticUNet(widths=(4, 6), convs=1)
    image, mask = torch.rand(2, 1, 8, 8), (torch.rand(2, 1, 8, 8) > 0.5).float()
    out = net(image, mask)
    found = losses.segmentation_terms(out, mask)
    q, p = out.posterior, out.prior
    literal = 0.0
    for mq, sq, mp, sp in zip(*(t.flatten().tolist() for t in (q.mean, q.log_sigma, p.mean, p.log_sigma))):
        literal += (sp - sq) + (math.exp(2 * sq) + (mq - mp) ** 2) / (2 * math.exp(2 * sp)) - 0.5
    assert math.isclose(found["kl"].detach(), literal / 2, rel_tol=1e-4, abs_tol=1e-6)
    assert found["ce"] == losses.cross_entropy(out.logits, mask)
    with pytest.raises(InputError, match="^output: "):
        losses.segmentation_terms(net.eval()(image), mask)


@pytest.mark.parametrize("s1, s2", [(0.0, 0.0), (4.0, 4.0), (-1.0, 0.7)])
def test_kendall_is_the_literal_formula(s1, s2):
    weighting = losses.KendallWeighting(kl_weight=10)
    weighting.log_variance.data = torch.tensor([s1, s2])
    literal = math.exp(-s1) * (0.3 + 10 * 0.02) + 0.5 * math.exp(-s2) * (0.1 + 0.7) + 0.5 * (s1 + s2)
    assert math.isclose(weighting(terms(), epoch=7).detach(), literal, rel_tol=1e-5)
    assert len(list(weighting.parameters())) == 1 and weighting.log_variance.requires_grad


@pytest.mark.parametrize("epoch", [0, 1, 7, 8, 50, 149])
def test_the_oscillating_weight_is_the_literal_formula(epoch):
    w = 0.5 * math.exp(-0.05 * epoch) * math.cos(0.03 * epoch * epoch) + 0.5
    found = losses.OscillatingWeighting(kl_weight=2)(terms(), epoch)
    assert math.isclose(found, w * (0.3 + 2 * 0.02) + (1 - w) * 0.8, rel_tol=1e-5)
    assert losses.oscillating_weight(0) == 1 and losses.oscillating_weight(7) > 0.5 > losses.oscillating_weight(8)


@pytest.mark.parametrize("call, name", [
    (lambda: losses.cross_entropy(torch.rand(1, 1, 2, 2), torch.rand(1, 2, 2)), "mask"),
    (lambda: losses.absolute_difference(torch.rand(1, 1, 2, 2), torch.rand(1, 2, 2)), "alpha"),
    (lambda: losses.gradient_difference(*[torch.rand(1, 1, 2, 2)] * 2, torch.ones(1, 2, 2, dtype=torch.bool)), "region"),
    (lambda: losses.KendallWeighting(kl_weight=-1), "kl_weight"), (lambda: losses.OscillatingWeighting("10"), "kl_weight"),
    (lambda: losses.KendallWeighting()({"ce": NAN}, 0), "terms"),
])  # fmt: skip
def test_bad_input_is_refused_by_name(call, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        call()


def test_divergence_is_the_mean_over_the_batch():
    q, p = (Gaussian(torch.randn(4, 2), torch.randn(4, 2)) for _ in range(2))
    each = [losses.divergence(Gaussian(*(t[b : b + 1] for t in q)), Gaussian(*(t[b : b + 1] for t in p))) for b in range(4)]
    assert math.isclose(losses.divergence(q, p), sum(map(float, each)) / 4, rel_tol=1e-5)
