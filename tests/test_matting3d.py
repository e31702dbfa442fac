"""3DMM: its wiring, its ablation and its losses against the literal formula."""

import numpy as np
import pytest
import torch

from medmatting.checks import InputError
from medmatting.losses3d import SLOPE, matting3d_terms, total_loss, weighted_difference, weighted_slopes
from medmatting.matting3d import Matting3D, Matting3DOutput

SMALL = dict(widths=(4, 6, 8), units=1, convs=1)


@pytest.mark.parametrize("shape", [(4, 4, 4), (5, 9, 7), (12, 4, 17)])
def test_gives_three_maps_of_the_size_of_the_volume(shape):
    said = Matting3D(2, **SMALL).eval()(torch.rand(2, 2, *shape))
    assert all(part.shape == (2, 1, *shape) for part in said) and 0 <= said.alpha.min() and said.alpha.max() <= 1


def test_masks_guide_alpha_before_each_of_the_three_groups():
    net, seen = Matting3D(**SMALL).eval(), []
    for group in net.matting.groups:
        group.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    said = net(torch.rand(1, 1, 4, 4, 4))
    assert len(seen) == 3 and all(features.shape[1] == 4 + 2 for features in seen)
    for features in seen:
        assert torch.equal(features[:, -2:-1], said.overlap.sigmoid()) and torch.equal(features[:, -1:], said.union.sigmoid())


def test_without_guidance_alpha_does_not_depend_on_the_masks():
    net = Matting3D(**SMALL, guided=False)
    net(torch.rand(2, 1, 4, 4, 4)).alpha.sum().backward()
    assert all(p.grad is None for branch in (net.overlap, net.union) for p in branch.parameters())
    assert all(p.grad is not None for p in net.encoder.parameters())


@pytest.mark.parametrize("shape, told", [((1, 1, 3, 8, 8), "at least 4"), ((1, 2, 8, 8, 8), "2 channels"), ((1, 8, 8, 8), "float tensor")])
def test_refuses_what_it_cannot_take(shape, told):
    with pytest.raises(InputError, match=told):
        Matting3D(**SMALL)(torch.rand(shape))


def literal_slopes(x):
    "Sobel of a 3D array along its axes, in alpha for each voxel, border repeated, by loops."
    smooth, slope = (0.25, 0.5, 0.25), (-0.5, 0.0, 0.5)
    padded, found = np.pad(x, 1, mode="edge"), np.zeros((3, *x.shape))
    for axis in range(3):
        taps = [slope if k == axis else smooth for k in range(3)]
        for place in np.ndindex(*x.shape):
            cube = padded[tuple(slice(i, i + 3) for i in place)]
            found[(axis, *place)] = np.einsum("ijk,i,j,k", cube, *taps)
    return found


def test_losses_equal_equations_5_and_6_voxel_by_voxel():
    random = np.random.default_rng(0)
    alpha, overlap, union = (random.normal(size=(2, 1, 3, 4, 5)) for _ in range(3))
    truth, wanted = random.random((2, 1, 3, 4, 5)), random.random((2, 2, 1, 3, 4, 5)) > 0.5
    said = Matting3DOutput(*(torch.tensor(x) for x in (alpha, overlap, union)))
    terms = matting3d_terms(said, torch.tensor(truth).float(), *(torch.tensor(m).double() for m in wanted))
    probability = lambda x: 1 / (1 + np.exp(-x))
    entropy = lambda x, m: -np.mean(m * np.log(probability(x)) + (1 - m) * np.log(1 - probability(x)))
    weight, away = 1 + wanted[1], probability(alpha) - truth
    slopes = np.stack([np.abs(literal_slopes(case[0])).sum(0) for case in away])[:, None]
    exact = {"overlap": entropy(overlap, wanted[0]), "union": entropy(union, wanted[1]),
             "alpha": (weight * np.abs(away)).sum() / away.size, "grad": (weight * slopes).sum() / away.size}  # fmt: skip
    assert terms.keys() == exact.keys()
    for name, value in exact.items():
        assert abs(float(terms[name]) - value) < 1e-5 * max(1, value), name
    assert abs(float(total_loss(terms)) - (exact["overlap"] + exact["union"] + 10 * exact["alpha"] + 10 * exact["grad"])) < 1e-4


def test_the_divisor_counts_voxels_not_weights():
    half = torch.full((1, 1, 4, 4, 4), 0.5)
    assert weighted_difference(half, 0 * half, torch.ones_like(half)) == 1.0
    assert weighted_difference(half, 0 * half, 0 * half) == 0.5


def test_losses_refuse_shapes_that_would_broadcast():
    x = torch.zeros(1, 1, 4, 4, 4)
    for loss in (weighted_difference, weighted_slopes):
        with pytest.raises(InputError, match="union"):
            loss(x, x, x[:, :, :1])


def test_slope_of_a_ramp():
    ramp = (torch.arange(6.0) / 6).reshape(1, 1, 6, 1, 1).expand(1, 1, 6, 4, 4)
    steep = weighted_slopes(ramp[:, :, 1:-1], 0 * ramp[:, :, 1:-1], 0 * ramp[:, :, 1:-1])
    assert SLOPE == 32 and abs(float(steep) - (1 / 6 + 1 / 12) / 2) < 1e-6  # half the slope where the border repeats
