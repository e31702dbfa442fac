"""Augmentation: each transformation changes its input, keeps the range, and moves image, matte and masks alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medmatting import augment as au
from medmatting.checks import InputError
from medmatting.photographs import skin

OFF = dict(flip=0, rotation=0, zoom=1, elastic=0)
ALONE = [dict(flip=1), dict(rotation=180), dict(zoom=2), dict(elastic=0.05)]
ALL = au.Augmentation(zoom=1.5)
only = lambda changes: au.Augmentation(**{**OFF, **changes})
generator = lambda seed=0: torch.Generator().manual_seed(seed)


def batch(size=(33, 48), n=3):
    image = torch.tensor(skin("ISIC_0012151").image[50 : 50 + size[0], 150 : 150 + size[1]] / 255).float().permute(2, 0, 1)
    y, x = np.ogrid[: size[0], : size[1]]
    alpha = torch.tensor(np.clip(1.5 - np.hypot(y - size[0] / 2, x - size[1] / 3) / (size[0] / 3), 0, 1)).float()[None]
    masks = torch.stack([alpha[0] > t for t in (0.2, 0.5, 0.8)])
    return tuple(t[None].repeat(n, 1, 1, 1) for t in (image, alpha, masks))


@pytest.mark.parametrize("changes", ALONE, ids=lambda c: next(iter(c)))
@pytest.mark.parametrize("seed", range(5))
def test_each_transformation_changes_its_input_and_keeps_the_range(changes, seed):
    image, alpha, masks = batch()
    out = au.augment(image, alpha, masks, only(changes), generator(seed))
    for before, after in zip((image, alpha, masks), out):
        assert after.shape == before.shape and after.dtype == before.dtype
        assert all((a != b).float().mean() > 0.01 for a, b in zip(after, before)), "every image of the batch has changed"
    assert image.min() <= out.image.min() and out.image.max() <= image.max()
    assert 0 <= out.alpha.min() and out.alpha.max() <= 1


def test_switched_off_nothing_changes():
    image, alpha, masks = batch()
    out = au.augment(image, alpha, masks, only({}), generator())
    assert torch.allclose(out.image, image, atol=1e-5) and torch.allclose(out.alpha, alpha, atol=1e-5)
    assert torch.equal(out.masks, masks)


def test_a_flip_is_a_flip_and_happens_as_often_as_asked():
    image, alpha, masks = batch(n=400, size=(9, 12))
    out = au.augment(image, alpha, masks, only(dict(flip=0.5)), generator())
    kinds = [alpha[0], alpha[0].flip(1), alpha[0].flip(2), alpha[0].flip(1, 2)]
    counts = [sum(torch.allclose(a, kind, atol=1e-5) for a in out.alpha) for kind in kinds]
    assert sum(counts) == 400 and min(counts) > 60
    assert torch.equal(au.augment(image, alpha, masks, only(dict(flip=1)), generator()).masks, masks.flip(2, 3))


def test_a_right_angle_is_a_rotation():
    image = torch.rand(1, 2, 8, 8)
    maps = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    y = torch.arange(8) - 3.5
    positions = torch.einsum("bij,hwj->bhwi", maps, torch.stack(torch.meshgrid(y, y, indexing="ij"), -1))
    grid = (2 * positions / 8).flip(-1)
    assert torch.allclose(au.read_at(image, grid), torch.rot90(image, -1, (2, 3)), atol=1e-5)


def test_angles_zooms_and_signs_have_their_ranges():
    maps = au.linear_maps(au.Augmentation(flip=0.5, rotation=30, zoom=2), 5000, generator())
    sign = torch.sign(torch.det(maps))
    factor = torch.det(maps).abs().sqrt()
    assert 0.49 < (sign > 0).float().mean() < 0.51 + 0.01
    assert 0.5 <= factor.min() < 0.51 and 1.96 < factor.max() <= 2 and abs(factor.log().mean()) < 0.02
    turned = au.linear_maps(only(dict(rotation=30)), 5000, generator())
    angle = torch.rad2deg(torch.atan2(turned[:, 1, 0], turned[:, 0, 0]))
    assert -30 <= angle.min() < -29.5 and 29.5 < angle.max() <= 30


def test_smooth_fields_are_white_noise_smoothed_by_a_gaussian():
    fields = au.smooth_fields(4000, (12, 40), 4.0, generator()).numpy()
    assert abs(fields.std(0) - 1).max() < 0.06 and abs(fields.mean(0)).max() < 0.08
    for distance in (2, 4, 8, 16):
        found = (fields[:, 6, 5] * fields[:, 6, 5 + distance]).mean()
        assert abs(found - np.exp(-(distance**2) / (4 * 4.0**2))) < 0.06


def test_the_default_bend_does_not_fold_and_has_the_stated_size():
    grid = au.sampling_grid(only(dict(elastic=0.017)), 50, (64, 96), generator())
    positions = (grid.flip(-1) * torch.tensor([64, 96]) / 2).numpy()
    still = au.sampling_grid(only({}), 1, (64, 96), generator()).flip(-1) * torch.tensor([64, 96]) / 2
    assert abs((positions - still.numpy()).std() / (0.017 * 64) - 1) < 0.1
    (yy, xy), (yx, xx) = ((np.diff(positions[..., i], axis=1)[:, :, :-1], np.diff(positions[..., i], axis=2)[:, :-1]) for i in (0, 1))
    assert (yy * xx - xy * yx).min() > 0.3


def test_reading_is_scipys_with_reflection():
    x = torch.rand(1, 1, 9, 13)
    grid = au.sampling_grid(ALL, 1, (9, 13), generator(4))
    where = [((grid[0, ..., i].double() + 1) * n / 2 - 0.5).numpy() for i, n in ((1, 9), (0, 13))]
    literal = ndimage.map_coordinates(x[0, 0].double().numpy(), where, order=1, mode="reflect")
    assert np.allclose(au.read_at(x, grid)[0, 0], literal, atol=1e-4)


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_a_composited_image_transforms_like_its_matte(seed, front, back):
    _, alpha, _ = batch(n=2)
    out = au.augment(alpha * front + (1 - alpha) * back, alpha, None, ALL, generator(seed))
    assert torch.allclose(out.image, out.alpha * front + (1 - out.alpha) * back, atol=1e-5)
    assert out.masks is None


def test_masks_move_with_the_matte():
    _, alpha, masks = batch(size=(64, 64))
    out = au.augment(alpha, alpha, masks, ALL, generator(1))
    agree = [(out.masks[:, i] == (out.alpha[:, 0] > t)).float().mean() for i, t in enumerate((0.2, 0.5, 0.8))]
    assert min(agree) > 0.97 and out.masks.dtype == torch.bool


def test_the_seed_decides_everything():
    torch.manual_seed(0)
    one = au.augment(*batch(), ALL, generator(5))
    torch.manual_seed(1)
    two, other = au.augment(*batch(), ALL, generator(5)), au.augment(*batch(), ALL, generator(6))
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and not torch.equal(one.image, other.image)
    assert not torch.equal(one.image[0], one.image[1]), "each image of a batch has its own transformation"


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3)])
def test_the_smallest_images_pass(size):
    out = au.augment(torch.rand(2, 3, *size), torch.rand(2, 1, *size), None, ALL, generator())
    assert out.image.shape == (2, 3, *size) and out.image.isfinite().all()


def test_constant_images_stay_constant():
    out = au.augment(torch.full((2, 1, 9, 9), 0.3), torch.zeros(2, 1, 9, 9), None, ALL, generator())
    assert (out.image == 0.3).all() and not out.alpha.any()


X, A, G = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), generator()


@pytest.mark.parametrize("call, name", [
    (lambda: au.Augmentation(flip=2), "flip"), (lambda: au.Augmentation(rotation=-1), "rotation"), (lambda: au.Augmentation(zoom=0.5), "zoom"),
    (lambda: au.Augmentation(elastic=float("nan")), "elastic"), (lambda: au.Augmentation(smoothness=0), "smoothness"),
    (lambda: au.augment(X[0], A, None, ALL, G), "image"), (lambda: au.augment((255 * X).byte(), A, None, ALL, G), "image"),
    (lambda: au.augment(X, A[:1], None, ALL, G), "alpha"), (lambda: au.augment(X, 2 * A, None, ALL, G), "alpha"),
    (lambda: au.augment(X, A * float("nan"), None, ALL, G), "alpha"), (lambda: au.augment(X, X.expand(-1, 2, -1, -1), None, ALL, G), "alpha"),
    (lambda: au.augment(X, A, torch.ones(2, 3, 4, 5), ALL, G), "masks"), (lambda: au.augment(X, A, torch.ones(2, 4, 4), ALL, G), "masks"),
    (lambda: au.augment(X, A, None, ALL, 0), "generator"),
])  # fmt: skip
def test_bad_input_is_refused_by_name(call, name):
    with pytest.raises(InputError, match=f"^{name}: "):
        call()


def test_a_crop_is_a_window_of_the_same_size_in_image_matte_and_masks():
    image, alpha, masks = batch(n=30)
    out = au.augment(image, alpha, masks, au.Augmentation(**{**OFF, "crop": 20}), generator())
    windows = alpha[0, 0].unfold(0, 20, 1).unfold(1, 20, 1)
    found = set()
    for cut, matte, raters in zip(out.image, out.alpha, out.masks):
        where = ((windows - matte[0]).abs().amax((2, 3)) < 1e-5).nonzero()
        assert len(where) == 1, "the matte is one window of the whole"
        y, x = where[0].tolist()
        assert torch.allclose(cut, image[0, :, y : y + 20, x : x + 20], atol=1e-5)
        assert torch.equal(raters, masks[0, :, y : y + 20, x : x + 20])
        found.add((y, x))
    assert len(found) > 15, "it can be anywhere"


@pytest.mark.parametrize("crop", [0, -3, 2.0, True])
def test_a_crop_is_a_whole_number(crop):
    with pytest.raises(InputError, match="crop"):
        au.Augmentation(crop=crop)


def test_a_crop_larger_than_the_image_is_refused():
    image, alpha, masks = batch(size=(20, 30))
    with pytest.raises(InputError, match="20 x 30"):
        au.augment(image, alpha, masks, au.Augmentation(crop=21), generator())
