"""Prediction: any size, tiles without seams, clear refusals; recipes and objectives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmatting import InputError
from medmatting.predict import load_network, predict, tiles
from medmatting.recipes import SMALL, Objective, Prepare, make_network, make_sample, paper_recipe
from medmatting.train import learning_rate, save_weights

TINY = dict(widths=(6, 8), convs=1, matting_widths=(6, 8, 8), units=1)
CARD = dict(data="", recipe={}, metrics={}, licence="", limits="")


class Brightness(torch.nn.Module):
    "Alpha is the first channel; uncertainty its position-free complement."

    config = {"channels": 1}

    def forward(self, image):
        return type("Said", (), dict(alpha=image[:, :1], uncertainty=1 - image[:, :1]))


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(2, 40), st.data())
def test_tiles_cover_everything_with_the_overlap(rows, columns, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    covered = np.zeros((rows, columns), int)
    for window in tiles((rows, columns), tile, overlap):
        covered[window] += 1
    assert covered.min() >= 1
    for axis, n in enumerate((rows, columns)):
        starts = sorted({(w[axis].start, w[axis].stop) for w in tiles((rows, columns), tile, overlap)})
        assert all(b[0] + overlap <= a[1] for a, b in zip(starts, starts[1:])) and starts[-1][1] == n


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(3, 30), st.booleans())
def test_tiling_and_flips_give_back_a_local_function(rows, columns, tile, flips):
    image = np.random.default_rng(0).random((rows, columns), np.float32)
    said = predict(Brightness(), image, flips=flips, tile=tile, overlap=tile // 3)
    np.testing.assert_allclose(said.alpha, image, atol=1e-6)
    np.testing.assert_allclose(said.uncertainty, 1 - image, atol=1e-6)


def test_a_network_comes_back_from_its_file(tmp_path):
    net = make_network("medical-matting", 1, **TINY).eval()
    save_weights(tmp_path / "a.safetensors", net, CARD)
    again, _ = load_network(tmp_path / "a.safetensors")
    image = np.random.default_rng(0).random((20, 30))
    assert np.array_equal(predict(net, image).alpha, predict(again, image).alpha)


def test_a_call_leaves_the_random_numbers_of_the_caller_alone():
    net = make_network("region-aware", 1, **TINY).eval()
    torch.manual_seed(1)
    predict(net, np.zeros((8, 8)))
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    net = make_network("region-aware", 1, **TINY)
    net.config = {**net.config, "kernel": 3}
    save_weights(tmp_path / "a.safetensors", net, CARD)
    with pytest.raises(InputError, match="does not fit the network 'region-aware'"):
        load_network(tmp_path / "a.safetensors")
    net.kind = "other"
    save_weights(tmp_path / "a.safetensors", net, CARD)
    with pytest.raises(InputError, match="a network 'other'"):
        load_network(tmp_path / "a.safetensors")


@pytest.mark.parametrize("bad", [np.full((4, 4), 40.0), np.zeros((4, 4, 2), np.uint8), np.zeros(4), np.zeros((0, 4)), np.full((4, 4), np.inf)])
def test_images_it_cannot_know_are_refused(bad):
    with pytest.raises(InputError, match="image"):
        predict(Brightness(), bad)


def test_colour_networks_take_grey_and_grey_ones_refuse_colour():
    assert predict(make_network("plain-unet", 3, widths=(4, 6), convs=1).eval(), np.zeros((9, 7), np.uint8)).alpha.shape == (9, 7)
    with pytest.raises(InputError, match="3 channels"):
        predict(Brightness(), np.zeros((9, 7, 3), np.uint8))


def sample(name="one", size=(24, 24)):
    rng = np.random.default_rng(0)
    alpha = rng.random(size)
    return make_sample(name, rng.random(size), alpha, np.stack([alpha > 0.3, alpha > 0.6]))


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("weighting", ["kendall", "oscillating"])
def test_one_step_of_each_objective_moves_every_part(kind, weighting):
    tiny = dict(widths=(6, 8), convs=1) if kind == "plain-unet" else TINY
    objective = Objective(make_network(kind, 1, **tiny), weighting)
    ready = [Prepare()(sample(), torch.Generator().manual_seed(i)) for i in range(2)]
    batch = {key: torch.stack([r[key] for r in ready]) for key in ("image", "alpha", "mask")} | {"epoch": 3}
    terms = objective(batch)
    terms["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters()) and all(v.isfinite() for v in terms.values())


def test_the_mask_of_the_posterior_is_one_readers_or_a_cut_through_alpha():
    one = sample()
    still = dict(flip=0, rotation=0, elastic=0)
    from medmatting.augment import Augmentation

    raters = {Prepare(Augmentation(**still), "raters")(one, torch.Generator().manual_seed(i))["mask"].sum().item() for i in range(20)}
    assert raters == {float(m.sum()) for m in one["masks"]}
    cut = Prepare(Augmentation(**still))(one, torch.Generator().manual_seed(0))
    inside = cut["alpha"][cut["mask"] > 0].min()
    assert inside >= cut["alpha"][cut["mask"] == 0].max()


def test_samples_without_raters_and_mismatched_sizes_are_refused():
    lone = make_sample("lone", np.zeros((8, 8)), np.zeros((8, 8)))
    with pytest.raises(InputError, match="lone has no raters"):
        Prepare(pseudo="raters")(lone, torch.Generator())
    with pytest.raises(InputError, match="one size for all"):
        make_sample("odd", np.zeros((8, 8)), np.zeros((8, 9)))
    with pytest.raises(InputError, match="alpha of grey"):
        make_sample("grey", np.zeros((8, 8)), np.full((8, 8), 255.0))


def test_the_paper_s_recipe_peaks_at_its_base_rate_after_one_epoch():
    recipe = paper_recipe(29)
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    assert recipe.steps == 700 and max(rates) == 5e-5 and rates.index(max(rates)) == 6


def test_the_same_seed_makes_the_same_network():
    first, second, other = (make_network("plain-unet", 1, widths=(4, 6), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first) and any(not torch.equal(first[k], other[k]) for k in first)
