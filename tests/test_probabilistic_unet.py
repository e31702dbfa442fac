"""The Probabilistic U-Net: literal formulas, gradients, determinism, refusals."""

import math

import pytest
import torch
from torch.distributions import Normal, kl
from torch.nn import functional as F

from medmatting import probabilistic_unet as pu
from medmatting.blocks import count_parameters
from medmatting.checks import InputError

torch.manual_seed(0)


def small(**changes):
    torch.manual_seed(3)
    return pu.ProbabilisticUNet(**{**dict(widths=(6, 8, 10), convs=1), **changes})


def gaussian(*shape):
    return pu.Gaussian(torch.randn(shape), torch.randn(shape))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_kl_equals_the_literal_sum_and_pytorchs():
    q, p = gaussian(5, 3), gaussian(5, 3)
    for b in range(5):
        total = 0.0
        for d in range(3):
            mq, mp, sq, sp = (float(t[b, d]) for t in (q.mean, p.mean, q.log_sigma.exp(), p.log_sigma.exp()))
            total += math.log(sp / sq) + (sq**2 + (mq - mp) ** 2) / (2 * sp**2) - 0.5
        assert math.isclose(pu.kl_divergence(q, p)[b], total, rel_tol=1e-4)
    theirs = kl.kl_divergence(Normal(q.mean, q.log_sigma.exp()), Normal(p.mean, p.log_sigma.exp())).sum(1)
    assert torch.allclose(pu.kl_divergence(q, p), theirs, rtol=1e-4)


def test_kl_of_extreme_spreads_is_finite():
    far = pu.Gaussian(torch.zeros(1, 2), torch.full((1, 2), -10.0)), pu.Gaussian(torch.zeros(1, 2), torch.full((1, 2), 10.0))
    assert pu.kl_divergence(*far).isfinite() and pu.kl_divergence(*far[::-1]).isfinite()
    net = small()
    unscaled = torch.full((2, 1, 8, 8), 1e6)  # an image that was never scaled to [0, 1]
    out = net(unscaled, torch.ones(2, 1, 8, 8))
    assert pu.kl_divergence(out.posterior, out.prior).isfinite().all()
    assert all(g.log_sigma.abs().max() <= 10 for g in (out.prior, out.posterior))


def test_draws_have_the_stated_mean_and_spread():
    g = pu.Gaussian(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, -1.0]]))
    z = g.draw(200_000, generator())
    assert torch.allclose(z.mean(0), g.mean, atol=0.02) and torch.allclose(z.std(0), g.log_sigma.exp(), rtol=0.02)


def test_fcomb_equals_copying_and_concatenating():
    fcomb, g, z = pu.Fcomb(7, 3, 2), torch.randn(2, 7, 5, 4), torch.randn(6, 2, 3)
    hidden, logits = fcomb(g, z)
    assert hidden.shape == (2, 7, 5, 4) and logits.shape == (6, 2, 2, 5, 4)
    weight = torch.cat([fcomb.from_features.weight[:, :, 0, 0], fcomb.from_latent.weight], 1)
    for n in range(6):
        joined = torch.cat([g, z[n, :, :, None, None].expand(-1, -1, 5, 4)], 1)
        first = (torch.einsum("oc,bchw->bohw", weight, joined) + fcomb.from_features.bias[:, None, None]).clamp(min=0)
        assert n > 0 or torch.allclose(fcomb.middle(first), hidden, atol=1e-5)
        assert torch.allclose(fcomb.last(fcomb.middle(first)), logits[n], atol=1e-5)


def test_published_parameter_counts():
    net = pu.ProbabilisticUNet()
    assert [count_parameters(m) for m in (net.prior, net.posterior, net.fcomb)] == [1_366_276, 1_366_564, 3_265]
    assert count_parameters(net) == 5_000_073


def test_class_probabilities_sum_to_one():
    assert torch.allclose(pu.class_probabilities(torch.randn(2, 1, 3, 3)).sum(1), torch.ones(2, 3, 3))
    one = torch.randn(2, 1, 3, 3)
    assert torch.allclose(pu.class_probabilities(one)[:, 1:], one.sigmoid())
    many = pu.class_probabilities(torch.randn(4, 2, 5, 3, 3))
    assert many.shape == (4, 2, 5, 3, 3) and torch.allclose(many.sum(2), torch.ones(4, 2, 3, 3))


@pytest.mark.parametrize("size", [(1, 1), (9, 5), (16, 16)])
def test_shapes_with_and_without_a_mask(size):
    net, image, mask = small(), torch.rand(2, 1, *size), torch.ones(2, 1, *size)
    out = net(image, mask, samples=3)
    assert out.logits.shape == (2, 1, *size) and out.latent_features.shape == (2, 6, *size)
    assert out.score_maps.shape == (3, 2, 2, *size) and out.posterior.mean.shape == (2, 2)
    assert net.eval()(image, samples=5).posterior is None
    many = small(classes=3, channels=2).eval()(torch.rand(1, 2, *size), samples=2)
    assert many.logits.shape == (1, 3, *size) and many.score_maps.shape == (2, 1, 3, *size)


def test_prediction_is_the_prior_mean_and_depends_on_the_seed_in_its_score_maps_only():
    net, image = small().eval(), torch.rand(2, 1, 12, 12)
    first, again, other = (net(image, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(first.score_maps, again.score_maps) and not torch.equal(first.score_maps, other.score_maps)
    assert torch.equal(first.logits, other.logits) and torch.equal(first.latent_features, other.latent_features)
    literal = net.fcomb(net.features(image), net.prior(image).mean[None])[1][0]
    assert torch.allclose(first.logits, literal, atol=1e-6)


def test_gradients_reach_the_posterior_through_the_one_draw_but_not_through_the_score_maps():
    net, image = small(), torch.rand(2, 1, 8, 8)
    mask = (image > 0.5).float()
    head = net.posterior.head.weight
    assert torch.autograd.grad(net(image, mask).logits.sum(), head)[0].any()
    assert torch.autograd.grad(net(image, mask).latent_features.sum(), head)[0].any()
    maps = net(image, mask).score_maps[:, :, 1].sum()
    assert not torch.autograd.grad(maps, head, retain_graph=True)[0].any()
    assert torch.autograd.grad(maps, net.fcomb.from_features.weight)[0].any()


def test_the_unet_runs_once_whatever_the_number_of_samples():
    net, calls = small().eval(), []
    net.encoder.register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(1, 1, 8, 8), samples=9)
    assert len(calls) == 1


def test_it_learns_two_outlines_of_one_image():
    torch.manual_seed(0)
    net, image = small(widths=(6, 8)), torch.rand(1, 1, 8, 8).expand(2, -1, -1, -1)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:6, 2:6] = mask[1] = 1
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        out = net(image, mask, samples=1)
        loss = F.binary_cross_entropy_with_logits(out.logits, mask, reduction="sum") + pu.kl_divergence(out.posterior, out.prior).sum()
        optimiser.zero_grad(), loss.backward(), optimiser.step()
    areas = (net.eval()(image[:1], samples=100, generator=generator()).score_maps[:, 0, 1] > 0.5).sum((1, 2))
    assert (areas < 24).float().mean() > 0.1 and (areas > 56).float().mean() > 0.1


@pytest.mark.parametrize("arguments, name", [
    (dict(image=torch.rand(1, 3, 8, 8)), "image"), (dict(image=torch.rand(8, 8)), "image"),
    (dict(image=torch.rand(1, 1, 8, 8), mask=torch.ones(1, 8, 8)), "mask"),
    (dict(image=torch.rand(1, 1, 8, 8), samples=0), "samples"),
])  # fmt: skip
def test_wrong_batches_are_refused(arguments, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        small().eval()(**arguments)


def test_training_needs_a_mask_and_more_than_one_value():
    with pytest.raises(InputError, match="^mask: "):
        small()(torch.rand(2, 1, 8, 8))
    with pytest.raises(InputError, match="^image: "):
        small()(torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("name, value", [("channels", 0), ("latent", 0), ("classes", 1), ("convs", 1.5), ("widths", ()), ("widths", (8, 0))])
def test_networks_that_cannot_be_built_are_refused(name, value):
    with pytest.raises(InputError, match=f"^{name}: "):
        pu.ProbabilisticUNet(**{name: value})
