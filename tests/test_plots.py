"""Pictures keep true proportions, say what they show, and are the same file for the same data."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from medmatting.checks import InputError
from medmatting.hounsfield import Window
from medmatting.plots import KINDS, alt_text, draw, image_kind, outline, panels, read_alt, save_figure, show
from medmatting.volumes import Volume

matplotlib.use("Agg")


@pytest.fixture
def ct():
    rng = np.random.default_rng(0)
    return Volume(rng.integers(-1000, 400, (6, 9, 12)).astype(np.int16), spacing=(2.5, 0.8, 0.5), unit="HU")


def ball(shape):
    mask = np.zeros(shape, np.uint8)
    mask[2:5, 3:7, 4:8] = 1
    return mask


def test_voxels_are_drawn_as_long_as_they_are_in_mm(ct):
    axial, coronal, sagittal = show(ct).axes[:3]
    assert [ax.get_aspect() for ax in (axial, coronal, sagittal)] == pytest.approx([0.8 / 0.5, 2.5 / 0.5, 2.5 / 0.8])
    # The head is up: row 0 (the lowest z) lies at the bottom of coronal and sagittal slices only.
    assert axial.get_ylim()[0] > axial.get_ylim()[1]
    assert coronal.get_ylim()[0] < coronal.get_ylim()[1]


def test_planes_meet_in_the_object_and_show_its_voxels(ct):
    alpha = ball(ct.shape) * 0.6
    figure = show(ct, alpha, at=(3, 4, 5))
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes[:3]]
    for got, want in zip(shown, (ct.array[3], ct.array[:, 4], ct.array[:, :, 5]), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(figure.axes[3].images[1].get_array(), alpha[3])


def test_a_margin_crops_in_mm_and_keeps_the_slice_numbers(ct):
    figure = show(ct, ball(ct.shape).astype(float), margin=1.0)
    assert figure.axes[0].images[0].get_array().shape == (4 + 2 * 2, 4 + 2 * 2)
    assert figure.axes[0].get_title() == "axial, z = 3"


def test_the_window_is_the_one_asked_for(ct):
    kind = image_kind(ct, Window(40, 400))
    assert (kind.low, kind.high, kind.label) == (-160, 240, "HU")
    assert image_kind(ct, (0, 5)).high == 5
    assert image_kind(np.zeros((3, 3), np.uint16)).high == 65535


def test_an_outline_runs_along_the_edges_of_the_voxels():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:4] = True
    figure, ax = matplotlib.pyplot.subplots()
    outline(ax, mask, "k")
    segments = np.array(ax.collections[0].get_segments())
    assert len(segments) == 8  # the border of two by two voxels
    assert np.all(np.abs(np.diff(segments, axis=1)).sum((1, 2)) == 1)
    assert segments.reshape(-1, 2).min(0).tolist() == [1.5, 0.5] and segments.reshape(-1, 2).max(0).tolist() == [3.5, 2.5]
    matplotlib.pyplot.close(figure)


def test_colour_maps_have_a_bar_with_its_unit(ct):
    figure = show(ct, ball(ct.shape).astype(float))
    assert {ax.get_ylabel() for ax in figure.axes} >= {"HU", "alpha"}
    figure = panels([[dict(image=np.zeros((4, 4)), kind="difference"), None]], rows=["case"])
    assert KINDS["difference"].label in {ax.get_ylabel() for ax in figure.axes}


def test_the_file_is_the_same_each_time_and_tells_what_it_shows(ct, tmp_path):
    for name in ("a", "b"):
        save_figure(show(ct, ball(ct.shape).astype(float), contours=[ball(ct.shape)]), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "6 x 9 x 12 voxels" in read_alt(tmp_path / "a.png") and "readers" in read_alt(tmp_path / "a.png")
    save_figure(show(ct), tmp_path / "a.png", alt="μ of alpha, 'quoted'")
    assert read_alt(tmp_path / "a.png") == "μ of alpha, 'quoted'"
    with Image.open(tmp_path / "a.png") as image:
        assert set(image.info) <= {"dpi", "Description"}


def test_a_figure_without_words_is_described_from_its_labels():
    figure, ax = matplotlib.pyplot.subplots()
    ax.set(xlabel="seconds", ylabel="residual")
    assert alt_text(figure) == "Figure: residual against seconds"
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(alpha=np.zeros((5, 9, 12))), "alpha"),
        (dict(contours=[np.zeros((6, 9))]), r"contours\[0\]"),
        (dict(trimap=np.ones((6, 9, 12), bool)), "trimap"),
        (dict(at=(0, 0, 12)), "at"),
        (dict(at=3), "at"),
        (dict(viewer="film"), "viewer"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(ct, arguments, named):
    with pytest.raises(InputError, match=f"^{named}"):
        show(ct, **arguments)


def test_nan_and_batches_are_refused():
    with pytest.raises(InputError, match="^image"):
        show(np.full((4, 4), np.nan))
    with pytest.raises(InputError, match="^image"):
        show(np.zeros((2, 3, 4, 5)))
    with pytest.raises(InputError, match="^path"):
        save_figure(None, "figure.jpg")


def test_niivue_gets_image_and_matte(ct):
    pytest.importorskip("ipyniivue")
    viewer = show(ct, ball(ct.shape).astype(np.float32), viewer="niivue")
    assert [v.colormap for v in viewer.volumes] == ["gray", "viridis"]


def test_the_slider_covers_the_volume(ct):
    assert show(ct, viewer="slider").children[0].max == 5
