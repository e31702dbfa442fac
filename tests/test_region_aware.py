"""The 2D networks as wholes: sizes, what reaches what, determinism, refusals."""

from pathlib import Path

import pytest
import torch

import medmatting
from medmatting import InputError
from medmatting.blocks import count_parameters
from medmatting.fusion import UPSAMPLINGS, NestedFusion, make_upsampling
from medmatting.medical_matting import ChannelAttention, MedicalMatting
from medmatting.plain_unet import PlainUNet
from medmatting.predict import load_network, load_shipped
from medmatting.region_aware import RegionAware
from medmatting.train import CARD, read_weights, save_weights

SMALL = dict(widths=(6, 8, 10), convs=1, matting_widths=(6, 8, 10), units=1)
NETS = {
    "plain": lambda: PlainUNet(1, (6, 8, 10), 1),
    "medical matting": lambda: MedicalMatting(**{**SMALL, "matting_widths": (6, 8, 8)}),
    **{name: lambda name=name: RegionAware(**SMALL, upsampling=name, read=5, hidden=7) for name in UPSAMPLINGS},
}


def batch(size=(24, 20)):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 1, *size, generator=generator)
    return image, (image > 0.5).float()


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_is_reached_by_the_loss(name):
    net, (image, mask) = NETS[name](), batch()
    said = net(image, mask)
    loss = said.alpha.mean()
    if said.segmentation is not None:
        loss = loss + said.segmentation.logits.mean() + said.segmentation.prior.mean.sum() + said.segmentation.prior.log_sigma.sum()
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 33), (64, 5)])
def test_any_size_comes_back(name, size):
    with torch.no_grad():
        said = NETS[name]().eval()(torch.rand(1, 1, *size))
    assert said.alpha.shape == (1, 1, *size) and said.alpha.isfinite().all() and 0 <= said.alpha.min() <= said.alpha.max() <= 1


@pytest.mark.parametrize("name", NETS)
def test_constant_images_give_finite_numbers(name):
    for value in (0.0, 1.0):
        with torch.no_grad():
            assert NETS[name]().eval()(torch.full((1, 1, 16, 16), value)).alpha.isfinite().all()


@pytest.mark.parametrize("name", NETS)
def test_wrong_channels_and_single_pixels_in_training_are_refused(name):
    with pytest.raises(InputError, match="image: got 3 channels"):
        NETS[name]()(torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16))
    with pytest.raises(InputError, match="batch normalisation"):
        NETS[name]()(torch.rand(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize(("build", "word"), [
    (lambda: RegionAware(**{**SMALL, "matting_widths": (6, 8)}), "matting_widths"),
    (lambda: MedicalMatting(**{**SMALL, "matting_widths": (6, 8, 8, 8)}), "matting_widths"),
    (lambda: RegionAware(**{**SMALL, "units": 0}), "units"),
    (lambda: PlainUNet(1, ()), "widths"),
])  # fmt: skip
def test_networks_that_cannot_be_built_are_refused_by_name(build, word):
    with pytest.raises(InputError, match=f"{word}: got"):
        build()


@pytest.mark.parametrize("name", ["region-aware", "medical matting"])
def test_use_depends_on_the_image_and_the_seed_only(name):
    net, (image, _) = NETS[name]().eval(), batch()
    with torch.no_grad():
        alone = net(image[:1], generator=torch.Generator().manual_seed(3))
        again = net(image[:1], generator=torch.Generator().manual_seed(3))
        other = net(image[:1], generator=torch.Generator().manual_seed(4))
    assert torch.equal(alone.alpha, again.alpha) and not torch.equal(alone.uncertainty, other.uncertainty)


def test_the_entropy_reaches_alpha():
    net, (image, _) = NETS["region-aware"]().eval(), batch()
    latent = torch.rand(2, 6, 24, 20)
    with torch.no_grad():
        a, b = (net.matting(image, latent, torch.full((2, 1, 24, 20), u)) for u in (0.0, 1.0))
    assert not torch.allclose(a, b)


def test_published_sizes():
    assert count_parameters(MedicalMatting()) == pytest.approx(6.78e6, rel=2e-3)
    assert count_parameters(MedicalMatting().matting) == pytest.approx(1.782e6, rel=1e-3)


def test_region_aware_starts_as_the_local_ensemble():
    image = torch.rand(1, 1, 16, 16)
    nets = []
    for name in ("region-aware", "local ensemble"):
        torch.manual_seed(0)
        nets.append(RegionAware(**SMALL, upsampling=name).eval())
    nets[1].load_state_dict({k: v for k, v in nets[0].state_dict().items() if ".offsets." not in k})
    with torch.no_grad():
        a, b = (net(image, generator=torch.Generator().manual_seed(0)).alpha for net in nets)
    torch.testing.assert_close(a, b)


def test_nesting_is_equation_3_for_two_scales():
    maps = [torch.randn(1, 3, 12, 9), torch.randn(1, 4, 6, 5), torch.randn(1, 5, 3, 3)]
    fusion = NestedFusion((3, 4, 5), "region-aware", scales=2, read=6, hidden=7)
    assert torch.equal(fusion(maps), torch.cat([maps[0], fusion.readers[0](maps[1], (12, 9))], 1))
    assert torch.equal(NestedFusion((3, 4, 5), scales=1)(maps), maps[0])


def test_bilinear_reading_has_nothing_to_learn():
    assert count_parameters(make_upsampling("bilinear", 4, 9)) == 0


def test_unknown_ways_and_scales_are_refused():
    with pytest.raises(InputError, match="upsampling: got 'cubic'"):
        RegionAware(**SMALL, upsampling="cubic")
    with pytest.raises(InputError, match="scales: got 4"):
        RegionAware(**SMALL, scales=4)


def one_step(coordinates):
    "A region-aware network after one step, and alpha of an image before and after it."
    torch.manual_seed(0)
    net, (image, mask) = RegionAware(**SMALL, read=5, hidden=7, coordinates=coordinates), batch()
    optimiser, answers = torch.optim.SGD(net.parameters(), 0.1), [alpha_of(net, image)]
    net.train()(image, mask, torch.Generator().manual_seed(1)).alpha.sub(mask).square().mean().backward()
    optimiser.step()
    return net, [*answers, alpha_of(net, image)]


def alpha_of(net, image):
    with torch.no_grad():
        return net.eval()(image, generator=torch.Generator().manual_seed(0)).alpha


def test_both_conventions_of_the_paper_train_differ_and_come_back(tmp_path):
    (relative, (a0, a1)), (offset, (b0, b1)) = one_step("relative"), one_step("offset")
    assert not torch.allclose(a0, a1) and not torch.allclose(b0, b1) and not torch.allclose(a0, b0) and not torch.allclose(a1, b1)
    for net, expected in ((relative, a1), (offset, b1)):
        save_weights(tmp_path / "net.safetensors", net, dict.fromkeys(CARD, ""))
        loaded, _ = load_network(tmp_path / "net.safetensors")
        assert loaded.config == net.config and torch.equal(alpha_of(loaded, batch()[0]), expected)


@pytest.mark.parametrize("name", ["nodules", "skin"])
def test_shipped_weights_without_a_convention_have_that_of_equation_2(name):
    path = Path(medmatting.__file__).parent / "data" / "models" / f"{name}.safetensors"
    kind, config, _, _ = read_weights(path)
    assert kind == "region-aware" and "coordinates" not in config
    assert {reader.coordinates for reader in load_shipped(name)[0].matting.fusion.readers} == {"relative"}


@pytest.mark.parametrize("name", UPSAMPLINGS[:3])
def test_the_other_convention_is_refused_where_no_position_is_learned(name):
    with pytest.raises(InputError, match=f"coordinates: got 'offset' for '{name}'"):
        RegionAware(**SMALL, upsampling=name, coordinates="offset")
    with pytest.raises(InputError, match="coordinates: got 'absolute'"):
        RegionAware(**SMALL, coordinates="absolute")


def test_channel_attention_equals_its_formula():
    attention, x = ChannelAttention(4, 2), torch.randn(2, 4, 3, 5)
    first, _, second = attention.mlp
    mlp = lambda v: second.weight @ torch.relu(first.weight @ v + first.bias) + second.bias
    for b in range(2):
        weight = torch.sigmoid(mlp(x[b].flatten(1).mean(1)) + mlp(x[b].flatten(1).max(1).values))
        torch.testing.assert_close(attention(x)[b], x[b] * weight[:, None, None])
