"""Blocks of the networks: sizes, parameter counts, literal formulas."""

import pytest
import torch
from torch.nn import functional as F

from medmatting import blocks
from medmatting.checks import InputError


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (13, 7), (32, 48)])
def test_a_unet_keeps_images_of_any_size(size):
    widths = (3, 4, 5, 6)
    unet = [blocks.Encoder(2, widths).eval(), blocks.Decoder(widths).eval()]
    features = unet[1](unet[0](torch.rand(2, 2, *size)))
    assert tuple(features[0].shape) == (2, 3, *size)
    for level, (width, f) in enumerate(zip(widths, features, strict=True)):
        assert tuple(f.shape[1:]) == (width, *(-(-n // 2**level) for n in size))


def test_a_unet_of_volumes():
    widths = (2, 3, 4)
    volume = torch.rand(2, 1, 5, 9, 6)
    encoder, decoder = blocks.Encoder(1, widths, blocks.residual_group, ndim=3), blocks.Decoder(widths, ndim=3)
    features = decoder(encoder(volume))
    assert [tuple(f.shape) for f in features] == [(2, 2, 5, 9, 6), (2, 3, 3, 5, 3), (2, 4, 2, 3, 2)]
    assert blocks.OutputBlock(2, 4, ndim=3)(features[0]).shape == (2, 1, 5, 9, 6)


def test_published_widths_have_the_published_number_of_parameters():
    widths = (32, 64, 128, 192)
    count = blocks.count_parameters(blocks.Encoder(1, widths)) + blocks.count_parameters(blocks.Decoder(widths))
    assert round(count / 1e6, 3) == 2.264


def test_halving_averages_the_pixels_that_exist():
    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    halved = blocks.Down(torch.nn.Identity())(x)[0, 0]
    expected = [[x[0, 0, r : r + 2, c : c + 2].mean() for c in (0, 2, 4)] for r in (0, 2)]
    assert torch.allclose(halved, torch.tensor(expected))


def test_upsampling_keeps_corners_and_is_linear_between():
    up = blocks.upsample(torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]]), (3, 5))[0, 0]
    literal = torch.tensor([[r * 2 / 2 + c / 4 for c in range(5)] for r in range(3)])
    assert torch.allclose(up, literal)


def test_a_residual_unit_is_its_formula():
    unit = blocks.ResidualUnit(3, 5).eval()
    for module in unit.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(), module.running_var.uniform_(0.5, 2), module.weight.data.uniform_(), module.bias.data.uniform_()
    x = torch.randn(2, 3, 6, 7)

    def layer(x, conv, bn):
        x = F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        return (x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]

    inner = layer(layer(x, unit.body[0], unit.body[1]).clamp(min=0), unit.body[3], unit.body[4])
    literal = (inner + layer(x, unit.shortcut[0], unit.shortcut[1])).clamp(min=0)
    assert torch.allclose(unit(x), literal, atol=1e-5)


def test_only_the_first_unit_of_a_group_changes_the_channels():
    group = blocks.residual_group(3, 5)
    assert [isinstance(u.shortcut, torch.nn.Identity) for u in group] == [False, True, True]


def test_initial_weights_are_he_normal_and_biases_zero():
    torch.manual_seed(0)
    layer = blocks.initialise(blocks.conv(64, 64))
    assert abs(layer.weight.std() / (2 / (64 * 9)) ** 0.5 - 1) < 0.02 and not layer.bias.any()


@pytest.mark.parametrize("x, word", [
    (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"), (torch.zeros(1, 2, 8, 8), "2 channels"), ([[1.0]], "list"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"), (torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
])  # fmt: skip
def test_a_wrong_batch_is_refused_by_name(x, word):
    with pytest.raises(InputError, match=f"^image: .*{word}"):
        blocks.check_batch("image", x, channels=3)


def test_a_batch_that_cannot_be_normalised_is_refused_in_training_only():
    encoder = blocks.Encoder(1, (2, 3, 4))
    with pytest.raises(InputError, match=r"^image: .*\(4, 3\)"):
        blocks.check_normalisable(encoder, torch.zeros(1, 1, 4, 3), 3)
    blocks.check_normalisable(encoder, torch.zeros(2, 1, 4, 3), 3)
    blocks.check_normalisable(encoder, torch.zeros(1, 1, 5, 3), 3)
    blocks.check_normalisable(encoder.eval(), torch.zeros(1, 1, 1, 1), 3)
