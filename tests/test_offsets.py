"""Where a value is read from: positions in pixels, the explorer's callbacks, and drawings that have to add up."""

import base64
import builtins
import io

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from medmatting.architecture import Diagram, trace
from medmatting.checks import InputError
from medmatting.implicit import sample_grid
from medmatting.offsets import OffsetExplorer, query_at, readings
from medmatting.region_aware import RegionAware

matplotlib.use("Agg")
TINY = dict(widths=(4, 5, 6), convs=1, matting_widths=(4, 5, 6), units=1, read=3, hidden=4, samples=2)


def network(seed=0, **changes):
    "A network whose offsets are not zero."
    torch.manual_seed(seed)
    net = RegionAware(**{**TINY, **changes}).eval()
    for reader in net.matting.fusion.readers:
        torch.nn.init.normal_(reader.offsets.weight, std=0.3)
    return net


@pytest.fixture
def image():
    return np.random.default_rng(0).random((24, 20), np.float32)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_positions_are_those_the_network_reads(image, kernel):
    # A ramp read at the positions has to give the positions themselves.
    net = network(kernel=kernel)
    for reading, size in zip(readings(net, image), ((12, 10), (24, 20)), strict=True):
        assert reading.learned.shape == (kernel**2, *size, 2) == reading.regular.shape
        step = np.array(reading.step)
        codes = torch.from_numpy((reading.learned + 0.5) / step - 0.5)
        rows, columns = (round(n / s) for n, s in zip(image.shape, step))
        ramp = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).float()[None]
        read = sample_grid(ramp, codes[None].float())[0].permute(1, 2, 3, 0).numpy()
        np.testing.assert_allclose((read + 0.5) * step - 0.5, reading.learned, atol=1e-3)
        assert np.abs(reading.learned - reading.regular).max() > 0.1


def test_the_last_reading_is_at_the_pixels_of_the_image(image):
    coarse, fine = readings(network(), image)
    assert np.allclose(fine.queries, np.stack(np.indices(image.shape), -1))
    assert query_at(fine, (7, 13)) == (7, 13) and query_at(coarse, (7, 13)) == (3, 6)
    assert query_at(coarse, (-5, 99)) == (0, 9)
    assert coarse.step == (4, 4) and fine.step == (2, 2)


def test_without_training_positions_are_those_of_the_local_ensemble(image):
    torch.manual_seed(0)
    for reading in readings(RegionAware(**TINY), image):
        np.testing.assert_allclose(reading.learned, reading.regular, atol=1e-5)


def test_a_network_that_reads_no_codes_is_refused(image):
    for changes in ({"upsampling": "bilinear"}, {"scales": 1}):
        with pytest.raises(InputError, match="net: got RegionAware"):
            readings(RegionAware(**{**TINY, **changes}), image)


def picture_of(explorer) -> np.ndarray:
    "What the explorer shows."
    data = base64.b64decode(explorer.picture.png) if hasattr(explorer.picture, "png") else explorer.picture.value
    return np.asarray(Image.open(io.BytesIO(data)))


def test_moving_a_slider_draws_another_pixel(image):
    explorer = OffsetExplorer(network(), image, (3, 4))
    first, words = picture_of(explorer), explorer.words.value
    explorer.row.value, explorer.column.value = 15, 10
    assert (picture_of(explorer) != first).any() and explorer.words.value != words


@pytest.mark.parametrize("bad", [np.full((24, 20), 255, np.uint8), np.full((24, 20), -850.0), np.full((24, 20), np.nan), np.zeros((0, 4)), np.zeros(5)])
def test_an_image_that_is_not_scaled_is_refused(bad):
    # Its features would be far from any that the network was trained on, and so would the positions.
    with pytest.raises(InputError, match=r"image: got a \w+ array of shape .*floats in \[0, 1\]"):
        readings(network(), bad)


@pytest.mark.parametrize("panel", [0, 1])
def test_a_click_chooses_the_pixel_under_it(image, panel):
    explorer = OffsetExplorer(network(), image)
    across, up = explorer.axes[panel].transData.transform((6, 17))
    explorer.picture.pressed = [1 - up / explorer.figure.bbox.height, across / explorer.figure.bbox.width]
    assert (explorer.row.value, explorer.column.value) == (17, 6)


def test_a_click_beside_the_panels_changes_nothing(image):
    explorer = OffsetExplorer(network(), image)
    before = explorer.row.value, explorer.column.value
    explorer.picture.pressed = [0.001, 0.5]
    assert (explorer.row.value, explorer.column.value) == before


def test_sliders_are_enough_where_clicks_are_not_to_be_had(image, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "anywidget":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    explorer = OffsetExplorer(network(), image)
    first = picture_of(explorer)
    explorer.row.value = 2
    assert (picture_of(explorer) != first).any()


# ---- drawings


def chain():
    return torch.nn.Sequential(torch.nn.Conv2d(2, 5, 3, padding=1), torch.nn.AvgPool2d(2), torch.nn.Conv2d(5, 3, 1))


def test_a_trace_says_what_passed_through_and_leaves_no_hook():
    net = chain()
    parts = trace(net, ["0", "1", "2"], torch.zeros(4, 2, 8, 6))
    assert parts["0"].received == ((2, 8, 6),) and parts["1"].gave == ((5, 4, 3),) and parts["2"].gave == ((3, 4, 3),)
    assert parts["0"].parameters == 2 * 5 * 9 + 5
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(InputError, match="names: got 'last'"):
        trace(net, ["last"], torch.zeros(1, 2, 8, 6))


def test_hooks_are_taken_off_when_the_network_fails():
    net = chain()
    with pytest.raises(RuntimeError):
        trace(net, ["0"], torch.zeros(1, 3, 8, 6))
    assert not any(module._forward_hooks for module in net.modules())


def test_arrows_have_to_add_up():
    import matplotlib.pyplot as plt

    parts = trace(chain(), ["0", "2"], torch.zeros(1, 2, 8, 8))
    figure, ax = plt.subplots()
    sketch = Diagram(ax, 4, 2, side=8)
    sketch.block("image", (2, 8, 8), (0.1, 1))
    sketch.block("first", parts["0"].gave[0], (1, 1))
    sketch.block("last", parts["2"].gave[0], (2, 1))
    sketch.arrow("image", "first")
    sketch.arrow("first", "last")
    sketch.adds_up("first", parts["0"])
    sketch.arrow("image", "last", via=1.9, sides="tt")
    with pytest.raises(InputError, match=r"first 5 \+ image 2 = 7 channels into last, but accepted is 5"):
        sketch.adds_up("last", parts["2"])
    with pytest.raises(InputError, match="arrow: got 'nowhere'"):
        sketch.arrow("image", "nowhere")
    heights = [sketch.boxes[name][3] - sketch.boxes[name][1] for name in ("first", "last")]
    assert heights[0] == pytest.approx(2 * heights[1])
    plt.close(figure)
