"""FBA against torchvision's ResNet, literal formulas, the published layout of its weights, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet50

from medmatting.blocks import count_parameters
from medmatting.checks import InputError
from medmatting.fba import (FBA, Layers, Standardised, encode_trimap, exclusion_loss, fba_loss, fuse, laplacian_loss,
                            laplacian_pyramid, load_fba, predict_fba, published_fba)  # fmt: skip
from medmatting.photographs import composite
from medmatting.volumes import Volume

WORDS = np.uint8([0, 128, 255])


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return FBA(16, (1, 1, 1, 1)).eval()


@pytest.fixture(scope="module")
def full():
    torch.manual_seed(0)
    return FBA().eval()


def tensors(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, *size, generator=generator), torch.rand(1, 8, *size, generator=generator)


# ---- the trimap


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_trimap_is_encoded_as_defined(height, width, seed):
    trimap = np.random.default_rng(seed).choice(WORDS, (height, width))
    encoded = encode_trimap(trimap)
    places = np.stack(np.mgrid[:height, :width], -1).astype(float)
    for k, value in enumerate((0, 255)):
        members = np.argwhere(trimap == value)
        squared = ((places[:, :, None] - members) ** 2).sum(-1).min(2) if len(members) else np.inf
        for j, s in enumerate((0.02, 0.08, 0.16)):
            assert np.allclose(encoded[3 * k + j], np.exp(-squared / (2 * (s * 320) ** 2)), atol=1e-6)
        assert np.array_equal(encoded[6 + k], trimap == value)


def test_continuing_the_border_does_not_change_distances():
    trimap = np.random.default_rng(0).choice(WORDS, (13, 21))
    assert np.array_equal(encode_trimap(np.pad(trimap, ((0, 3), (0, 3)), mode="edge"))[:, :13, :21], encode_trimap(trimap))


# ---- the network


def test_the_published_number_of_parameters(full):
    assert count_parameters(full) == 34_693_031
    without_classes = 25_557_032 - 1000 * 2049  # torchvision's ResNet-50 and its last layer
    assert count_parameters(full.encoder) == without_classes + 8 * 64 * 7 * 7
    assert round(count_parameters(full.decoder) / 1e6, 2) == 11.16
    assert count_parameters(FBA(16)) < count_parameters(full) / 15


def test_the_encoder_is_a_dilated_resnet_50(full):
    norm = lambda channels: nn.GroupNorm(32, channels)
    other = resnet50(norm_layer=norm, replace_stride_with_dilation=[False, True, True])
    other.conv1 = nn.Conv2d(11, 64, 7, 2, 3, bias=False)
    encoder = full.encoder
    weights = {published_fba(key): value for key, value in encoder.state_dict().items()}
    convolutions = {f"{name}.weight" for name, layer in other.named_modules() if isinstance(layer, nn.Conv2d)}
    literal = lambda w: (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    weights = {key: literal(value) if key in convolutions else value for key, value in weights.items()}
    unused = other.load_state_dict(weights, strict=False)
    assert unused.missing_keys == ["fc.weight", "fc.bias"] and unused.unexpected_keys == []
    x = torch.rand(1, 11, 48, 40)
    with torch.no_grad():
        stem, fine, deep = encoder(x)
        y = other.relu(other.bn1(other.conv1(x)))
        assert torch.allclose(stem, y, atol=1e-5)
        y = other.layer1(other.maxpool(y))
        assert torch.allclose(fine, y, atol=1e-4)
        assert torch.allclose(deep, other.layer4(other.layer3(other.layer2(y))), atol=1e-3)
    assert deep.shape == (1, 2048, 6, 5)


def test_standardised_weights_have_a_gradient_and_no_scale():
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Standardised(), w)
    assert torch.allclose(Standardised()(w), Standardised()(1000 * w + 7), atol=1e-4)


def test_every_parameter_learns(small):
    model = FBA(16, (1, 1, 1, 1)).train()
    rgb, trimap = tensors(32, 40)
    truth = torch.rand(1, 1, 32, 40)
    sum(fba_loss(model(rgb, trimap), rgb, truth, rgb, 1 - rgb).values()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 8), (8, 8), (17, 30)])
def test_any_size_is_answered_in_that_size(small, size):
    with torch.no_grad():
        layers = small(*tensors(*size))
    assert layers.alpha.shape == (1, 1, *size) and layers.background.shape == layers.foreground.shape == (1, 3, *size)
    assert all(x.isfinite().all() and x.min() >= 0 and x.max() <= 1 for x in layers)


def test_padding_repeats_the_border(small):
    rgb, trimap = tensors(13, 21)
    edged = [torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 3), (0, 3)), mode="edge")) for x in (rgb, trimap)]
    with torch.no_grad():
        assert torch.allclose(small(rgb, trimap).alpha, small(*edged).alpha[..., :13, :21], atol=1e-6)


def test_in_training_alpha_is_not_clipped():
    model = FBA(16, (1, 1, 1, 1))
    nn.init.constant_(model.decoder.conv_up4[-1].bias[:1], -5)
    rgb, trimap = tensors(16, 16)
    alpha = model.train()(rgb, trimap).alpha
    assert alpha.min() < 0
    alpha.sum().backward()
    assert model.decoder.conv_up4[-1].bias.grad[0] != 0
    assert (model.eval()(rgb, trimap).alpha >= 0).all()


@pytest.mark.parametrize(("rgb", "trimap", "words"), [((1, 1, 8, 8), (1, 8, 8, 8), "1 channels"), ((1, 3, 8, 8), (1, 3, 8, 8), "3 channels"),
                                                      ((3, 8, 8), (1, 8, 8, 8), "rgb"), ((1, 3, 0, 8), (1, 8, 0, 8), "rgb")])  # fmt: skip
def test_batches_of_another_shape_are_refused(small, rgb, trimap, words):
    with pytest.raises(InputError, match=words):
        small(torch.zeros(rgb), torch.zeros(trimap))


@pytest.mark.parametrize(("options", "words"), [({"width": 30}, "multiple of 4"), ({"width": 0}, "multiple of 4"), ({"width": 16.0}, "multiple of 4"),
                                                ({"blocks": (1, 1, 1)}, "four"), ({"blocks": (1, 1, 1, 0)}, "four")])  # fmt: skip
def test_networks_that_cannot_be_built_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        FBA(**options)


# ---- fusion


def test_fusion_pixel_by_pixel():
    generator = np.random.default_rng(0)
    c, f, b, a = (generator.random((1, n, 3, 4)) for n in (3, 3, 3, 1))
    fused = fuse(torch.from_numpy(c), Layers(*map(torch.from_numpy, (a, f, b))))
    for y, x in np.ndindex(3, 4):
        C, F, B, alpha = c[0, :, y, x], f[0, :, y, x], b[0, :, y, x], a[0, 0, y, x]
        F = F + alpha * (C - alpha * F - (1 - alpha) * B)
        B = B + (1 - alpha) * (C - alpha * F - (1 - alpha) * B)
        F, B = F.clip(0, 1), B.clip(0, 1)
        best = (0.1 * alpha + (C - B) @ (F - B)) / (0.1 + (F - B) @ (F - B))
        found = [layer[0, :, y, x].numpy() for layer in fused]
        assert np.allclose(found[0], best) and np.allclose(found[1], F) and np.allclose(found[2], B)


# ---- losses


def literal_pyramid(image, levels):
    "Plain loops over an image whose border is repeated."
    taps = np.array([1, 4, 6, 4, 1]) / 16
    at = lambda a, y, x: a[min(max(y, 0), a.shape[0] - 1), min(max(x, 0), a.shape[1] - 1)]
    details = []
    for _ in range(levels):
        half = np.zeros(((image.shape[0] + 1) // 2, (image.shape[1] + 1) // 2))
        for i, j in np.ndindex(half.shape):
            half[i, j] = sum(taps[p] * taps[q] * at(image, 2 * i + p - 2, 2 * j + q - 2) for p in range(5) for q in range(5))
        grown = np.zeros(image.shape)
        for y, x in np.ndindex(image.shape):
            even = [(p, q) for p in range(5) for q in range(5) if (y + p) % 2 == 0 and (x + q) % 2 == 0]
            grown[y, x] = 4 * sum(taps[p] * taps[q] * at(half, (y + p - 2) // 2, (x + q - 2) // 2) for p, q in even)
        details.append(image - grown)
        image = half
    return details


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 1), (1, 5)])
def test_the_pyramid_is_that_of_plain_loops(size):
    image = np.random.default_rng(0).random(size)
    expected = literal_pyramid(image, 5)
    found = laplacian_pyramid(torch.from_numpy(image)[None, None])
    assert all(np.allclose(a[0, 0], b) for a, b in zip(found, expected, strict=True))
    loss = sum(2**s * np.abs(detail).sum() for s, detail in enumerate(expected)) / image.size
    assert np.isclose(laplacian_loss(torch.from_numpy(image)[None, None]).item(), loss)


def test_without_true_colours_their_terms_are_left_out():
    rgb, _ = tensors(16, 16)
    layers = Layers(rgb[:, :1], rgb, 1 - rgb)
    with_all = fba_loss(layers, rgb, rgb[:, :1] * 0.5, rgb, rgb)
    without = fba_loss(layers, rgb, rgb[:, :1] * 0.5)
    assert with_all.keys() - without.keys() == {"alpha composed", "colours", "colours pyramid"}
    assert all(with_all[name] == value for name, value in without.items())
    assert torch.isclose(without["alpha"], (rgb[:, :1] * 0.5).mean())
    with pytest.raises(InputError, match="both or none"):
        fba_loss(layers, rgb, rgb[:, :1], rgb)


def test_colours_count_only_where_they_show():
    rgb, _ = tensors(8, 8)
    alpha = torch.zeros(1, 1, 8, 8)
    wrong_front = fba_loss(Layers(alpha, rgb * 0, rgb), rgb, alpha, rgb, rgb)
    assert wrong_front["colours"] == wrong_front["colours pyramid"] == 0
    assert fba_loss(Layers(alpha, rgb, rgb * 0), rgb, alpha, rgb, rgb)["colours"] > 0.1


def test_exclusion_of_one_row():
    front, back = torch.tensor([0.0, 1, 1]).expand(1, 3, 1, 3), torch.tensor([0.0, 0.5, 0]).expand(1, 3, 1, 3)
    assert exclusion_loss(front, back) == 0.25 and exclusion_loss(front[..., :1], back[..., :1]) == 0


# ---- prediction


def test_known_pixels_stand_and_a_volume_comes_back_on_its_grid(small):
    case = composite("chelsea")
    part = np.s_[140:213, 200:241]
    grey = case.image[part].mean(-1).astype(np.uint8)
    matte = predict_fba(small, Volume(grey, (0.5, 0.25), origin=(3, 4)), case.trimap_r10[part])
    alpha, labels = np.asarray(matte.alpha), case.trimap_r10[part]
    assert matte.alpha.spacing == (0.5, 0.25) and matte.alpha.origin == (3, 4) and alpha.dtype == np.float32
    assert (alpha[labels == 255] == 1).all() and (alpha[labels == 0] == 0).all() and set(np.unique(labels)) == {0, 128, 255}
    assert np.allclose(matte.foreground[labels == 255], grey[labels == 255, None] / 255)
    assert np.allclose(matte.background[labels == 0], grey[labels == 0, None] / 255)
    same = predict_fba(small, np.repeat(grey[..., None], 3, 2), labels)
    assert np.array_equal(same.alpha, alpha)


@pytest.mark.parametrize("value", WORDS)
def test_one_pixel(small, value):
    alpha = predict_fba(small, np.uint8([[77]]), np.array([[value]])).alpha
    assert alpha.shape == (1, 1) and 0 <= alpha <= 1 and (value == 128 or alpha == value / 255)


# ---- published weights


def published_shapes():
    "Names and shapes of the authors' file, spelt out."
    shapes = {}

    def norm(name, channels):
        shapes.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    shapes["encoder.conv1.weight"] = (64, 11, 7, 7)
    norm("encoder.bn1", 64)
    inputs = 64
    for layer, (planes, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1):
        for block in range(blocks):
            name = f"encoder.layer{layer}.{block}"
            sizes = [(planes, inputs, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
            for i, size in enumerate(sizes, 1):
                shapes[f"{name}.conv{i}.weight"] = size
                norm(f"{name}.bn{i}", size[0])
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * planes, inputs, 1, 1)
                norm(f"{name}.downsample.1", 4 * planes)
            inputs = 4 * planes
    layers = [(f"ppm.{i}.1", f"ppm.{i}.2", (256, 2048, 1, 1)) for i in range(4)]
    layers += [("conv_up1.0", "conv_up1.1", (256, 3072, 3, 3)), ("conv_up1.3", "conv_up1.4", (256, 256, 3, 3)),
               ("conv_up2.0", "conv_up2.1", (256, 512, 3, 3)), ("conv_up3.0", "conv_up3.1", (64, 320, 3, 3)),
               ("conv_up4.0", None, (32, 72, 3, 3)), ("conv_up4.2", None, (16, 32, 3, 3)), ("conv_up4.4", None, (7, 16, 1, 1))]  # fmt: skip
    for conv, after, size in layers:
        shapes[f"decoder.{conv}.weight"], shapes[f"decoder.{conv}.bias"] = size, size[:1]
        if after:
            norm(f"decoder.{after}", size[0])
    return shapes


def test_the_published_file_fits_and_every_tensor_finds_its_place(tmp_path):
    # Each tensor is one number shown at the size of the tensor, so the file is small.
    file = {name: torch.tensor(float(i)).expand(size) for i, (name, size) in enumerate(published_shapes().items())}
    torch.save(file, tmp_path / "FBA.pth")
    model = load_fba(tmp_path / "FBA.pth")
    state = model.state_dict()
    assert len(state) == len(file) == 197 and not model.training
    assert all((state[key] == file[published_fba(key)]).all() for key in state)
    places = dict(model.named_modules())
    for name, value in file.items():  # a standardised layer keeps the file's weight as the one it standardises
        layer, _, kind = name.rpartition(".")
        raw = places[layer].parametrizations.weight.original if f"{layer}.parametrizations.weight.original" in state and kind == "weight" else getattr(places[layer], kind)
        assert (raw == value).all()


def test_weights_that_are_standardised_already_give_the_same_alpha(small):
    twice = FBA(16, (1, 1, 1, 1)).eval()
    state = small.state_dict()
    ready = {key: Standardised()(v) if key.endswith("original") else v for key, v in state.items()}
    twice.load_state_dict(ready)
    rgb, trimap = tensors(16, 16)
    with torch.no_grad():
        assert torch.allclose(small(rgb, trimap).alpha, twice(rgb, trimap).alpha, atol=1e-4)


@pytest.mark.parametrize(("change", "words"), [
    (lambda d: d.pop("decoder.conv_up4.4.bias"), r"1 tensors missing \(decoder.conv_up4.4.bias\)"),
    (lambda d: d.update({"encoder.conv1.weight": torch.zeros(64, 3, 7, 7)}), r"of another shape \(encoder.conv1.weight\)"),
    (lambda d: d.update({"fc.weight": torch.zeros(1000, 2048)}), r"1 tensors left over \(fc.weight\)"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_the_names(tmp_path, change, words):
    file = {name: torch.zeros(()).expand(size) for name, size in published_shapes().items()}
    change(file)
    torch.save(file, tmp_path / "other.pth")
    with pytest.raises(InputError, match=words) as caught:
        load_fba(tmp_path / "other.pth")
    assert "FBA" in str(caught.value) and "other.pth" in str(caught.value)
