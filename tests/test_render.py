"""Soft volumes from outside, and animations: laws of light, geometry, and files that are the same for the same frames."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medmatting.checks import InputError, WriteError
from medmatting.render import DARK, beside, rays, save_animation, soft_view
from medmatting.volumes import Volume


def blob(shape=(9, 11, 13), seed=0):
    "Something without any symmetry, 0 at its border."
    values = np.zeros(shape, np.float32)
    values[2:-2, 2:-2, 2:-2] = np.random.default_rng(seed).random([n - 4 for n in shape])
    return values


@settings(deadline=None, max_examples=25)
@given(alpha=st.floats(0.05, 1), deep=st.integers(3, 20), density=st.floats(0.05, 2), step=st.sampled_from([0.25, 0.5, 1.0]))
def test_light_is_held_back_by_what_lies_on_the_ray_however_it_is_sampled(alpha, deep, density, step):
    wall = np.zeros((7, deep + 8, 7), np.float32)
    wall[:, 4:-4] = alpha
    seen = rays(wall, tilt=0, density=density, pixel_mm=1.0, step_mm=step)
    middle = tuple(n // 2 for n in seen.cover.shape)
    assert seen.cover[middle] == pytest.approx(1 - np.exp(-density * alpha * deep), rel=0.02)
    assert 0 < seen.alpha[middle] <= alpha + 1e-6


def test_the_sum_over_rays_is_that_of_the_fog_where_it_is_thin():
    values = blob()
    seen = rays(values, turn=37, tilt=25, density=1e-4, pixel_mm=0.5, step_mm=0.5)
    assert seen.cover.sum() * 0.5**2 / 1e-4 == pytest.approx(values.sum(), rel=0.02)


def test_a_turn_of_the_eye_is_a_turn_of_the_volume():
    values = blob((9, 11, 11))
    for turned in range(4):
        whole, part = rays(values, turn=90 * turned, pixel_mm=1), rays(np.rot90(values, turned, (1, 2)).copy(), pixel_mm=1)
        assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(whole, part))
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(rays(values, 360), rays(values, 0)))


def test_the_head_is_up_the_face_in_front_and_the_left_side_to_the_right():
    values = np.zeros((9, 9, 9), np.float32)
    values[7, 4, 6] = 1  # towards the head and the patient's left
    cover = rays(values, tilt=0, pixel_mm=1.0).cover
    row, column = np.unravel_index(cover.argmax(), cover.shape)
    assert row < cover.shape[0] // 2 and column > cover.shape[1] // 2
    veil = np.zeros((9, 9, 9), np.float32)
    veil[:, 1], veil[:, 7] = 1, 0.2
    assert rays(veil, tilt=0, density=9, pixel_mm=1.0).alpha[4, 6] > 0.4 > rays(veil, turn=180, tilt=0, density=9, pixel_mm=1.0).alpha[4, 6]


def test_frames_of_a_turn_have_one_size_and_hold_everything():
    values = Volume(blob((6, 14, 10)), spacing=(2.5, 0.7, 0.7))
    sizes = {rays(values, turn).cover.shape for turn in range(0, 360, 30)}
    assert len(sizes) == 1
    for turn in (0, 45, 130):
        cover = rays(values, turn).cover
        assert cover.max() > 0.1 and max(cover[0].max(), cover[-1].max(), cover[:, 0].max(), cover[:, -1].max()) < 1e-3


def test_nothing_is_dark_and_a_mask_has_its_colour():
    assert (soft_view(np.zeros((4, 5, 6))) == DARK).all()
    picture = soft_view(np.pad(np.ones((6, 6, 6)), 2), colour="#FF0000", density=9)
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2].astype(int)
    assert middle[0] > 100 and middle[1:].max() < 25


@pytest.mark.parametrize("ending", [".webp", ".gif"])
def test_the_same_frames_give_the_same_bytes_and_come_back(tmp_path, ending):
    frames = [soft_view(blob(), turn, pixel_mm=0.25) for turn in (0, 60, 120)]
    for name in ("one", "two"):
        save_animation(tmp_path / f"{name}{ending}", frames, 0.2)
    assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"two{ending}").read_bytes()
    with Image.open(tmp_path / f"one{ending}") as kept:
        assert kept.n_frames == 3 and kept.size == frames[0].shape[1::-1]
        for number, frame in enumerate(frames):
            kept.seek(number)
            assert np.abs(np.asarray(kept.convert("RGB"), float) - frame).mean() < 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"one{ending}", f"two{ending}"]


def test_a_full_disk_keeps_the_older_file(tmp_path, monkeypatch):
    frames = [soft_view(blob(), turn) for turn in (0, 60)]
    save_animation(tmp_path / "turn.webp", frames)
    before = (tmp_path / "turn.webp").read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(WriteError, match="No space left.*kept"):
        save_animation(tmp_path / "turn.webp", frames[::-1])
    assert [path.name for path in tmp_path.iterdir()] == ["turn.webp"] and (tmp_path / "turn.webp").read_bytes() == before


@pytest.mark.parametrize("wrong, word", [
    (lambda f: rays(np.full((3, 3, 3), 1.5)), "alpha"), (lambda f: rays(np.zeros((3, 3))), "alpha"), (lambda f: rays(np.full((3, 3, 3), np.nan)), "alpha"),
    (lambda f: rays(np.zeros((3, 3, 3)), density=0), "density"), (lambda f: rays(np.zeros((3, 3, 3)), spacing=(1, 0, 1)), "spacing"),
    (lambda f: save_animation(f / "a.mp4", [np.zeros((4, 4, 3), np.uint8)] * 2), "path"),
    (lambda f: save_animation(f / "a.gif", [np.zeros((4, 4, 3), np.uint8)]), "frames"),
    (lambda f: save_animation(f / "a.gif", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)]), "frames"),
    (lambda f: save_animation(f / "a.gif", [np.zeros((4, 4, 3))] * 2), "frames"), (lambda f: save_animation(f / "a.gif", [np.zeros((4, 4, 3), np.uint8)] * 2, 0), "seconds"),
    (lambda f: beside({"a": np.zeros((4, 4, 3), np.uint8), "b": np.zeros((5, 4, 3), np.uint8)}), "pictures"),
])  # fmt: skip
def test_refusals_name_the_argument(tmp_path, wrong, word):
    with pytest.raises(InputError, match=word):
        wrong(tmp_path)
    assert not any(tmp_path.iterdir())
