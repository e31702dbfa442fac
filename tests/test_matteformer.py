"""MatteFormer against torchvision's Swin transformer, literal loops, the published layout of its weights, and bad input."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformerBlock

from medmatting.checks import InputError
from medmatting.matteformer import (Block, Heads, MatteFormer, PatchMerging, from_windows, load_matteformer, matteformer_loss,
                                    one_hot_trimap, position_index, predict_matteformer, prior_tokens, published_matteformer,
                                    refine, reflect_pad, regions, shift_mask, spectral, to_windows, uncertain_band)  # fmt: skip
from medmatting.photographs import composite
from medmatting.volumes import Volume

WORDS = np.uint8([0, 128, 255])


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return MatteFormer(24, (2, 2, 2, 2), decoder_width=8).eval()


def tensors(*size, batch=1, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.choice(WORDS, (batch, *size))
    trimap = np.stack([one_hot_trimap(part) for part in labels])
    return torch.from_numpy(generator.random((batch, 3, *size), np.float32)), torch.from_numpy(trimap)


# ---- windows and positions


def test_windows_and_back():
    x = torch.randn(2, 14, 21, 3)
    windows = to_windows(x)
    for b, i, j, y, k in [(0, 0, 0, 0, 0), (1, 1, 2, 6, 5), (1, 0, 1, 3, 2)]:
        assert torch.equal(windows[b, 3 * i + j, 7 * y + k], x[b, 7 * i + y, 7 * j + k])
    assert torch.equal(from_windows(windows, (14, 21)), x)


def test_the_mask_keeps_apart_what_was_rolled_around():
    mask = shift_mask((14, 7))
    rolled = lambda place, n: (place + 3) % n < 3  # the first three rows end up last
    for w, i, j in np.ndindex(2, 49, 49):
        (yi, xi), (yj, xj) = ((7 * w + k // 7, k % 7) for k in (i, j))
        apart = rolled(yi, 14) != rolled(yj, 14) or rolled(xi, 7) != rolled(xj, 7)
        assert mask[w, i, j] == (-100 if apart else 0)


def test_positions_are_numbered_by_displacement():
    index = position_index(6)
    for i, j in np.ndindex(49, 49):
        assert index[i, j] == (i // 7 - j // 7 + 6) * 13 + (i % 7 - j % 7 + 6)
    assert (index[:, 49:] == 169 + torch.arange(6)).all()


# ---- prior tokens and blocks


def test_a_prior_token_is_the_mean_of_its_class():
    x, areas = torch.randn(2, 5, 6, 4), torch.zeros(2, 5, 6, 3)
    labels = np.random.default_rng(0).integers(0, 2, (2, 5, 6))  # the third class does not occur
    areas.scatter_(3, torch.from_numpy(labels)[..., None], 1)
    tokens = prior_tokens(x, areas)
    for b, q in np.ndindex(2, 2):
        assert torch.allclose(tokens[b, q], x[b][torch.from_numpy(labels[b] == q)].mean(0), atol=1e-5)
    assert (tokens[:, 2] == 0).all()


@pytest.mark.parametrize("place", [0, 1])
def test_without_prior_tokens_a_block_is_a_swin_block(place):
    torch.manual_seed(0)
    ours = Block(12, 3, place).eval()
    swin = SwinTransformerBlock(12, 3, window_size=[7, 7], shift_size=[3 * place] * 2).eval()
    names = {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    state = ours.state_dict()
    for key, value in swin.state_dict().items():
        source = next((key.replace(a, b) for a, b in names.items() if a in key), key)
        if not key.endswith("index"):
            value.copy_(state[source][:169] if key.endswith("table") else state[source])
    with torch.no_grad():
        ours.attn.relative_position_bias_table[169:] = -1e9  # nobody looks at a prior token
        x, areas = torch.randn(2, 17, 10, 12), torch.rand(2, 17, 10, 3)
        found, _ = ours(x, torch.randn(2, 3 * place, 12), areas)
        assert torch.allclose(found, swin(x), atol=1e-5)


def literal_block(block, x, memory, areas):
    "One token at a time: everything a block does, for one image, without windows as tensors."
    get = lambda name: dict(block.named_parameters())[name].detach().double().numpy()
    x, memory, areas = (t[0].double().numpy() for t in (x, memory, areas))
    height, width, channels = x.shape
    heads, shift = block.attn.heads, block.shift
    norm = lambda v, n: (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5) * get(f"{n}.weight") + get(f"{n}.bias")
    linear = lambda v, n: v @ get(f"{n}.weight").T + get(f"{n}.bias")
    gelu = lambda v: torch.nn.functional.gelu(torch.from_numpy(v)).numpy()
    finish = lambda v: v + linear(gelu(linear(norm(v, "norm2"), "mlp.fc1")), "mlp.fc2")
    tokens = [sum(areas[p][q] * x[p] for p in np.ndindex(height, width)) / areas[..., q].sum() for q in range(3)]
    memory = np.concatenate([memory, tokens])
    tall, broad = height + -height % 7, width + -width % 7
    padded = np.zeros((tall, broad, channels))
    padded[:height, :width] = norm(x, "norm1")
    q, k, v = (part.reshape(tall, broad, heads, -1) for part in np.split(linear(padded, "attn.qkv"), 3, -1))
    _, prior_k, prior_v = (part.reshape(len(memory), heads, -1) for part in np.split(linear(norm(memory, "norm1"), "attn.qkv"), 3, -1))
    table, out = get("attn.relative_position_bias_table"), np.zeros(x.shape)
    place = lambda y, x: ((y - shift) % tall, (x - shift) % broad)
    for me in np.ndindex(height, width):
        my, mx = place(*me)
        near = [(p, (place(*p))) for p in np.ndindex(tall, broad) if place(*p)[0] // 7 == my // 7 and place(*p)[1] // 7 == mx // 7]
        answer = np.zeros((heads, channels // heads))
        for h in range(heads):
            logits = []
            for p, (y, w) in near:
                apart = shift and any((a < shift) != (b < shift) for a, b in zip(p, me))
                logits.append(q[me][h] @ k[p][h] / np.sqrt(channels / heads) + table[(my - y + 6) * 13 + mx - w + 6, h] - 100 * bool(apart))
            logits += [q[me][h] @ prior_k[m, h] / np.sqrt(channels / heads) + table[169 + m, h] for m in range(len(memory))]
            weights = np.exp(np.array(logits) - max(logits))
            values = [v[p][h] for p, _ in near] + [prior_v[m, h] for m in range(len(memory))]
            answer[h] = weights @ np.array(values) / weights.sum()
        out[me] = linear(answer.reshape(-1), "attn.proj")
    passed = linear(prior_v.reshape(len(memory), channels), "attn.proj")
    return finish(x + out), finish(memory + passed)


@pytest.mark.parametrize("place", [0, 1])
def test_a_block_is_that_of_plain_loops(place):
    torch.manual_seed(1)
    block = Block(6, 2, place).eval()
    nn.init.normal_(block.attn.relative_position_bias_table)
    x, memory, areas = torch.randn(1, 9, 8, 6), torch.randn(1, 3 * place, 6), torch.rand(1, 9, 8, 3)
    with torch.no_grad():
        found = block(x, memory, areas)
    expected = literal_block(block, x, memory, areas)
    assert all(np.allclose(a[0], b, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_merging_takes_rows_before_columns():
    merge = PatchMerging(1)
    nn.init.zeros_(merge.reduction.weight)
    with torch.no_grad():
        merge.reduction.weight[0] = torch.tensor([1.0, 10, 100, 1000])
        merge.norm = nn.Identity()
        assert merge(torch.tensor([[1.0, 2], [3, 4]])[None, :, :, None])[0, 0, 0, 0] == 1 + 30 + 200 + 4000


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(6, 4, 4)])
def test_spectral_layers_have_largest_singular_value_one(layer):
    layer = spectral(layer).eval()
    assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) - 1) < 0.02


# ---- the network


def test_prior_tokens_come_as_unknown_background_foreground_at_each_resolution(small):
    rgb, trimap = tensors(64, 32)
    seen, hooks = [], []
    for stage in small.encoder.layers:
        hooks.append(stage.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1])))
    with torch.no_grad():
        small(rgb, trimap)
    for hook in hooks:
        hook.remove()
    for step, areas in zip((4, 8, 16, 32), seen, strict=True):
        for q, channel in enumerate((1, 0, 2)):  # the trimap comes as background, unknown, foreground
            assert torch.equal(areas[0, ..., q], trimap[0, channel, ::step, ::step])


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (31, 33), (32, 64)])
def test_any_size_is_answered_in_that_size(small, size):
    with torch.no_grad():
        heads = small(*tensors(*size))
    assert all(a.shape == (1, 1, *size) and a.isfinite().all() and 0 <= a.min() <= a.max() <= 1 for a in heads)


def test_images_of_a_batch_do_not_meet(small):
    rgb, trimap = tensors(40, 33, batch=2)
    with torch.no_grad():
        both, one = small(rgb, trimap), small(rgb[1:], trimap[1:])
    assert all(torch.allclose(a[1:], b, atol=1e-5) for a, b in zip(both, one))


@pytest.mark.parametrize(("size", "margin"), [((1, 1), 32), ((2, 3), 32), ((33, 64), 32), ((32, 5), 0)])
def test_padding_reflects(size, margin):
    x = np.random.default_rng(0).random(size)
    after = [margin + -(n + 2 * margin) % 32 for n in size]
    expected = np.pad(x, [(margin, a) for a in after], mode="reflect")
    assert np.array_equal(reflect_pad(torch.from_numpy(x), margin), expected) and not any(n % 32 for n in expected.shape)


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = MatteFormer(24, (2, 2, 2, 2), decoder_width=8, drop_path=0.0).train()
    for block in model.modules():  # the last scale of a branch starts at 0 and hides what lies before
        if hasattr(block, "bn2"):
            nn.init.ones_(block.bn2.weight)
    rgb, trimap = tensors(64, 64, batch=2)
    sum(matteformer_loss(model(rgb, trimap), rgb, rgb[:, :1], trimap, rgb, 1 - rgb).values()).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert still == set()


@pytest.mark.parametrize(("rgb", "trimap", "words"), [((1, 1, 8, 8), (1, 3, 8, 8), "1 channels"), ((1, 3, 8, 8), (1, 8, 8, 8), "8 channels"),
                                                      ((3, 8, 8), (1, 3, 8, 8), "rgb")])  # fmt: skip
def test_batches_of_another_shape_are_refused(small, rgb, trimap, words):
    with pytest.raises(InputError, match=words):
        small(torch.zeros(rgb), torch.zeros(trimap))


def test_training_on_a_single_value_per_channel_is_refused():
    with pytest.raises(InputError, match="batch normalisation"):
        MatteFormer(24, (1, 1, 1, 1), decoder_width=8).train()(*tensors(20, 20))


@pytest.mark.parametrize(("options", "words"), [({"width": 32}, "multiple"), ({"depths": (2, 2)}, "four"), ({"heads": (3, 6, 12, 0)}, "four"),
                                                ({"drop_path": 1.0}, "probability"), ({"decoder_width": 0}, "positive")])  # fmt: skip
def test_networks_that_cannot_be_built_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        MatteFormer(**options)


# ---- refinement and losses


@pytest.mark.parametrize("diameter", [1, 2, 7, 15])
def test_the_band_is_a_disc(diameter):
    alpha = torch.zeros(1, 1, 30, 40)
    alpha[0, 0, 10, 12], alpha[0, 0, 20, 20], alpha[0, 0, 0, 39] = 0.5, 0.003, 0.997
    y, x = np.mgrid[:30, :40]
    assert np.array_equal(uncertain_band(alpha, diameter)[0, 0], (y - 10) ** 2 + (x - 12) ** 2 <= diameter**2 / 4)


def test_refinement_takes_the_finest_where_it_matters():
    coarse, middle, fine = (torch.full((1, 1, 20, 60), value) for value in (0.0, 0.5, 1.0))
    coarse[..., 30] = 0.5
    alpha = refine(Heads(coarse, middle, fine))[0, 0]
    assert alpha[10, :20].max() == 0 and (alpha[10, 23:38] == 1).all() and alpha[10, 55] == 0
    certain = Heads(coarse.round(), middle, fine)
    assert torch.equal(refine(certain), certain.stride8)


def test_each_reading_is_judged_in_its_region():
    rgb, trimap = tensors(40, 40)
    heads = Heads(*torch.rand(3, 1, 1, 40, 40))
    heads.stride8[..., :20] = 0
    everywhere, coarse, fine = regions(heads, trimap, (5, 3))
    merged = torch.where(uncertain_band(heads.stride8, 5), heads.stride4, heads.stride8)
    assert everywhere.all() and torch.equal(coarse.bool(), uncertain_band(heads.stride8, 5)) and torch.equal(fine.bool(), uncertain_band(merged, 3))
    truth = torch.rand(1, 1, 40, 40)
    terms = matteformer_loss(heads, rgb, truth, trimap)
    unknown = trimap[:, 1:2] == 1
    errors = [(heads.stride8 - truth).abs().mean(), (heads.stride4 - truth)[unknown].abs().mean(), (heads.stride1 - truth)[unknown].abs().mean()]
    assert torch.isclose(terms["alpha"], (errors[0] + errors[1] + 2 * errors[2]) / 5)
    with pytest.raises(InputError, match="both or none"):
        matteformer_loss(heads, rgb, truth, trimap, rgb)


def test_a_region_without_pixels_costs_nothing():
    ones, trimap = torch.ones(1, 1, 8, 8), torch.zeros(1, 3, 8, 8)
    assert sum(matteformer_loss(Heads(ones, 0 * ones, 0 * ones), torch.rand(1, 3, 8, 8), ones, trimap).values()) == 0


# ---- prediction


def test_known_pixels_stand_and_a_volume_comes_back_on_its_grid(small):
    case = composite("chelsea")
    part = np.s_[140:213, 200:241]
    grey, labels = case.image[part].mean(-1).astype(np.uint8), case.trimap_r10[part]
    alpha = predict_matteformer(small, Volume(grey, (0.5, 0.25), origin=(3, 4)), labels)
    assert alpha.spacing == (0.5, 0.25) and alpha.origin == (3, 4) and alpha.array.dtype == np.float32
    assert (alpha.array[labels == 255] == 1).all() and (alpha.array[labels == 0] == 0).all() and set(np.unique(labels)) == {0, 128, 255}
    assert np.array_equal(predict_matteformer(small, np.repeat(grey[..., None], 3, 2), labels), alpha.array)


@pytest.mark.parametrize("value", WORDS)
def test_one_pixel(small, value):
    alpha = predict_matteformer(small, np.uint8([[77]]), np.array([[value]]))
    assert alpha.shape == (1, 1) and 0 <= alpha <= 1 and (value == 128 or alpha == value / 255)


# ---- published weights


def published_shapes():
    "Names and shapes of the authors' file, spelt out."
    shapes = {}

    def pair(name, outputs, *inputs):
        shapes.update({f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)})

    def batch_norm(name, n):
        pair(name, n)
        shapes.update({f"{name}.running_mean": (n,), f"{name}.running_var": (n,), f"{name}.num_batches_tracked": ()})

    def spectral_conv(name, *size):
        shapes.update({f"{name}.module.weight_bar": size, f"{name}.module.weight_u": size[:1],
                       f"{name}.module.weight_v": (int(np.prod(size[1:])),)})  # fmt: skip

    pair("encoder.patch_embed.proj", 96, 6, 4, 4), pair("encoder.patch_embed.norm", 96)
    for i, (depth, heads) in enumerate([(2, 3), (2, 6), (6, 12), (2, 24)]):
        n = 96 * 2**i
        for j in range(depth):
            name = f"encoder.layers.{i}.blocks.{j}"
            pair(f"{name}.norm1", n), pair(f"{name}.norm2", n)
            pair(f"{name}.attn.qkv", 3 * n, n), pair(f"{name}.attn.proj", n, n)
            pair(f"{name}.mlp.fc1", 4 * n, n), pair(f"{name}.mlp.fc2", n, 4 * n)
            shapes[f"{name}.attn.relative_position_bias_table"] = (169 + 3 * (j + 1), heads)
            shapes[f"{name}.attn.relative_position_index"] = (49, 49 + 3 * (j + 1))
        if i < 3:
            shapes[f"encoder.layers.{i}.downsample.reduction.weight"] = (2 * n, 4 * n)
            pair(f"encoder.layers.{i}.downsample.norm", 4 * n)
        pair(f"encoder.norm{i}", n)
    for i, (a, b) in enumerate([(6, 32), (96, 32), (96, 64), (192, 128), (384, 256), (768, 512)]):
        for place, inputs in ((0, a), (3, b)):
            spectral_conv(f"encoder.shortcut.{i}.{place}", b, inputs, 3, 3)
            batch_norm(f"encoder.shortcut.{i}.{place + 2}", b)
    for i, (a, b, blocks) in enumerate([(512, 256, 2), (256, 128, 3), (128, 64, 3), (64, 32, 2)], 1):
        for j in range(blocks):
            name, inputs, edge = f"decoder.layer{i}.{j}", b if j else a, 3 if j else 4
            spectral_conv(f"{name}.conv1", inputs, inputs, edge, edge), batch_norm(f"{name}.bn1", inputs)
            spectral_conv(f"{name}.conv2", b, inputs, 3, 3), batch_norm(f"{name}.bn2", b)
            if j == 0:
                spectral_conv(f"{name}.upsample.1", b, a, 1, 1), batch_norm(f"{name}.upsample.2", b)
    spectral_conv("decoder.conv1", 32, 32, 4, 4), batch_norm("decoder.bn1", 32)
    for stride, inputs in ((1, 32), (4, 64), (8, 128)):
        name = f"decoder.refine_OS{stride}"
        shapes[f"{name}.0.weight"] = (32, inputs, 3, 3)
        batch_norm(f"{name}.1", 32), pair(f"{name}.3", 1, 32, 3, 3)
    return shapes


def published_file():
    "A small file: each tensor is one number shown at the size of the tensor; the index as it must be."
    file = {}
    for i, (name, size) in enumerate(published_shapes().items()):
        whole = name.endswith("num_batches_tracked")
        file[name] = torch.tensor(i if whole else float(i)).expand(size)
        if name.endswith("index"):
            file[name] = position_index(size[1] - 49)
    return file


def test_the_published_file_fits_and_every_tensor_finds_its_place(tmp_path):
    file = published_file()
    torch.save({"iter": 1, "state_dict": {f"module.{k}": v for k, v in file.items()}}, tmp_path / "best_model.pth")
    model = load_matteformer(tmp_path / "best_model.pth")
    state = model.state_dict()
    assert len(state) == len(file) == 509 and not model.training
    assert all((state[key] == file[published_matteformer(key)]).all() for key in state)
    block = model.decoder.layer1[0].conv1.parametrizations.weight
    assert (block.original == file["decoder.layer1.0.conv1.module.weight_bar"]).all() and (block[0]._u == file["decoder.layer1.0.conv1.module.weight_u"]).all()
    numbers = sum(np.prod(size) for name, size in published_shapes().items() if not name.endswith(("index", "tracked", "running_mean", "running_var")))
    assert numbers == 44_813_136


@pytest.mark.parametrize(("change", "words"), [
    (lambda d: d.pop("encoder.norm3.bias"), r"1 tensors missing \(encoder.norm3.bias\)"),
    (lambda d: d.update({"encoder.patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)}), r"of another shape \(encoder.patch_embed.proj.weight\)"),
    (lambda d: d.update({"head.weight": torch.zeros(1000, 768)}), r"1 tensors left over \(head.weight\)"),
    (lambda d: d.update({"encoder.layers.0.blocks.0.attn.relative_position_index": position_index(3).flip(0)}), "1 tensors of another design"),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_with_the_names(tmp_path, change, words):
    file = published_file()
    change(file)
    torch.save(file, tmp_path / "other.pth")
    with pytest.raises(InputError, match=words) as caught:
        load_matteformer(tmp_path / "other.pth")
    assert "MatteFormer" in str(caught.value) and "other.pth" in str(caught.value)
