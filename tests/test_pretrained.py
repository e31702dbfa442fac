"""What the networks made for photographs share: the way in for an image, and the strict reader of published weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medmatting.checks import InputError
from medmatting.pretrained import load_published, read_weights, rgb_and_trimap
from medmatting.volumes import Volume

TRIMAP = np.uint8([[0, 128, 255], [0, 128, 255]])


# ---- images


def test_a_grey_image_is_repeated_and_a_colour_image_keeps_its_order():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    rgb, labels = rgb_and_trimap(grey, TRIMAP)
    assert rgb.dtype == np.float32 and labels is not None
    assert all(np.array_equal(channel, grey / np.float32(255)) for channel in rgb)
    same, _ = rgb_and_trimap(grey[..., None], TRIMAP)
    assert np.array_equal(same, rgb)
    colour = np.random.default_rng(0).integers(0, 2**16, (2, 3, 3)).astype(np.uint16)
    rgb, _ = rgb_and_trimap(Volume(colour, channels=True), TRIMAP)
    assert np.array_equal(rgb, np.moveaxis(colour, 2, 0) / np.float32(65535))


def test_hounsfield_units_are_clipped_to_their_range():
    hu = np.int16([[-2000, -1000, -300], [400, 401, 3000]])
    expected = np.float32([[0, 0, 0.5], [1, 1, 1]])
    assert np.array_equal(rgb_and_trimap(Volume(hu, unit="HU"), TRIMAP)[0][1], expected)
    assert np.array_equal(rgb_and_trimap(hu, TRIMAP, hu_range=(-1000, 400))[0][1], expected)
    assert np.array_equal(rgb_and_trimap(hu, TRIMAP, intensity_range=(-1000, 400))[0][1], expected)


@pytest.mark.parametrize(
    ("image", "trimap", "words"),
    [
        (np.zeros((2, 3, 4), np.uint8), TRIMAP, "4 channels"),
        (np.zeros((2, 3, 2), np.uint8), TRIMAP, "2 channels"),
        (np.zeros(3, np.uint8), TRIMAP, r"\(H, W\)"),
        (np.zeros((0, 3), np.uint8), TRIMAP, r"\(H, W\)"),
        (Volume(np.zeros((2, 3, 3), np.uint8)), TRIMAP, "one slice"),
        (np.zeros((2, 3), complex), TRIMAP, "complex128"),
        (np.full((2, 3), np.nan), TRIMAP, "6 NaN"),
        (np.full((2, 3), 300.0), TRIMAP, "intensity_range"),
        (np.zeros((2, 3), np.uint8), TRIMAP[:, :2], "shape"),
        (np.zeros((2, 3), np.uint8), TRIMAP > 0, "mask"),
    ],
)
def test_an_image_that_is_none_is_refused(image, trimap, words):
    with pytest.raises(InputError, match=words):
        rgb_and_trimap(image, trimap)


def test_a_trimap_may_lack_a_class():
    _, labels = rgb_and_trimap(np.zeros((1, 1), np.uint8), np.uint8([[128]]))
    assert labels == 128


# ---- weights


def save(path, content):
    torch.save(content, path)
    return path


def line():
    "A network of two tensors that a file calls W and b."
    return nn.Linear(2, 1), {"weight": "W", "bias": "b"}.get


GOOD = {"W": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([5.0])}


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"state_dict": d, "iter": 3, "loss": {"mse": 0.1}},
                                  lambda d: {f"module.{k}": v for k, v in d.items()},
                                  lambda d: {k: v.double() for k, v in d.items()}])  # fmt: skip
def test_weights_arrive_however_they_were_wrapped(tmp_path, wrap):
    model, names = line()
    model.train()
    load_published(model, save(tmp_path / "w.pth", wrap(GOOD)), names, "a line")
    assert model(torch.tensor([1.0, 2.0])).item() == 16 and not model.training
    assert model.weight.dtype == torch.float32 and model.weight.requires_grad


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"W": GOOD["W"]}, r"1 tensors missing \(b\)"),
        (GOOD | {"c.10": GOOD["b"], "c.9": GOOD["b"]}, r"2 tensors left over \(c\.9, c\.10\)"),
        (GOOD | {"W": torch.ones(2, 1)}, r"1 tensors of another shape \(W\)"),
        (GOOD | {"b": torch.tensor([float("nan")])}, r"1 tensors not finite \(b\)"),
        ({f"x{i}": torch.ones(1) for i in range(9)}, r"9 tensors left over \(x0, x1, x2, \.\.\.\)"),
        (torch.ones(3), "not tensors by name"),
        ({}, "not tensors by name"),
        ({"W": 3}, "not tensors by name"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(tmp_path, content, words):
    model, names = line()
    before = model.weight.clone()
    with pytest.raises(InputError, match=words) as caught:
        load_published(model, save(tmp_path / "other.pth", content), names, "a line")
    assert "other.pth" in str(caught.value) and torch.equal(model.weight, before)


def test_weights_are_read_from_safetensors_too(tmp_path):
    model, names = line()
    save_file(GOOD, tmp_path / "w.safetensors")
    assert load_published(model, tmp_path / "w.safetensors", names, "a line")(torch.tensor([1.0, 2.0])).item() == 16


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 40, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, ending, keep):
    path = tmp_path / f"w.{ending}"
    (torch.save if ending == "pth" else save_file)(GOOD, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_weights(path)


def test_nothing_in_a_file_is_executed(tmp_path):
    target = tmp_path / "made_by_the_file"

    class Trap:
        def __reduce__(self):
            return (type(target).touch, (target,))

    with pytest.raises(InputError, match="objects other than tensors"):
        read_weights(save(tmp_path / "w.pth", {"W": Trap()}))
    assert not target.exists()


@pytest.mark.parametrize("name", ["missing.pth", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="no file"):
        read_weights(tmp_path / name)
