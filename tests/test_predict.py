"""Prediction: any size, tiles without seams, clear refusals; recipes and objectives."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medmatting
from medmatting import InputError
from medmatting.predict import SHIPPED, load_network, load_shipped, predict, suitable_zoom, tiles
from medmatting.recipes import Objective, Prepare, make_network, make_sample, paper_recipe, random_trimap
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, bad):
    net = make_network("plain-unet", 1, widths=[4, 6], convs=1)
    with torch.no_grad():
        net.output[-1].bias[0] = bad
    save_weights(tmp_path / "a.safetensors", net, CARD)
    with pytest.raises(InputError, match=r"NaN or infinite numbers in output\.1\.bias"):
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


def batch_of(objective, prepare, epoch):
    ready = [prepare(sample(), torch.Generator().manual_seed(i)) for i in range(2)]
    return {key: torch.stack([r[key] for r in ready]) for key in ready[0] if key != "name"} | {"epoch": epoch}


@pytest.mark.parametrize("kind", ["plain-unet", "medical-matting", "region-aware"])
@pytest.mark.parametrize("weighting", ["kendall", "oscillating"])
def test_one_step_of_each_objective_moves_every_part(kind, weighting):
    tiny = dict(widths=(6, 8), convs=1) if kind == "plain-unet" else TINY
    objective = Objective(make_network(kind, 1, **tiny), weighting)
    terms = objective(batch_of(objective, Prepare(), 3))
    terms["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters()) and all(v.isfinite() for v in terms.values())


@pytest.mark.parametrize("kind, options", [("fba", dict(width=4, blocks=(1, 1, 1, 1))),
                                           ("matteformer", dict(width=24, depths=(1, 1, 1, 1), decoder_width=4, drop_path=0.0))])
@pytest.mark.parametrize("epoch", [0, 50])
def test_networks_that_read_a_trimap_learn_by_the_same_call(kind, options, epoch):
    torch.manual_seed(0)
    objective = Objective(make_network(kind, 1, **options))
    batch = batch_of(objective, Prepare(encode=objective.net.encode), epoch)
    assert batch["image"].shape == (2, 3, 24, 24) and batch["trimap"].shape == (2, 8 if kind == "fba" else 3, 24, 24)
    terms = objective(batch)
    terms["loss"].backward()
    learned = [p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters()]
    assert np.mean(learned) > 0.7 and all(v.isfinite() for v in terms.values())
    assert terms["loss"].item() == pytest.approx(sum(v.item() for name, v in terms.items() if name not in ("loss", "mae")), rel=1e-5)


def discs(mask, radius):
    "Pixels of a mask farther than radius from every pixel outside, by brute force."
    outside = np.argwhere(~mask)
    near = lambda p: len(outside) and ((outside - p) ** 2).sum(1).min() <= radius**2
    return np.array([[mask[y, x] and not near((y, x)) for x in range(mask.shape[1])] for y in range(mask.shape[0])])


@pytest.mark.parametrize("raters", [True, False])
def test_a_random_trimap_shrinks_both_classes_by_discs_within_their_range(raters):
    y, x = np.mgrid[:90, :100]
    distance = np.hypot(y - 40, x - 50)
    alpha = np.clip((30 - distance) / 6, 0, 1).astype(np.float32)
    masks = np.stack([distance < 28, distance < 24]) if raters else None
    sure, union = (distance < 24, distance < 28) if raters else (alpha >= 254 / 255, alpha > 1 / 255)
    for seed in range(4):
        drawn = random_trimap(torch.from_numpy(alpha)[None], None if masks is None else torch.from_numpy(masks).float(),
                              torch.Generator().manual_seed(seed))
        assert drawn.dtype == np.uint8 and set(np.unique(drawn)) == {0, 128, 255}
        for mask, known in ((sure, drawn == 255), (~union, drawn == 0)):
            assert not known[~mask].any()
            widest = 90 / 44
            assert known[discs(mask, widest)].all() and not (known & ~discs(mask, 1)).any()


def test_a_random_trimap_of_nothing_knows_no_foreground_and_all_of_it_no_background():
    for value, expected in ((0.0, 0), (1.0, 255)):
        assert (random_trimap(torch.full((1, 9, 9), value), None, torch.Generator().manual_seed(0)) == expected).all()


def test_a_trimap_follows_the_augmentation():
    one = sample(size=(40, 40))
    alpha = np.zeros((40, 40), np.float32)
    alpha[5:15, 5:30] = 1
    one = make_sample("block", alpha, alpha, alpha[None] > 0)
    for seed in range(5):
        ready = Prepare(encode=lambda trimap: trimap[None])(one, torch.Generator().manual_seed(seed))
        trimap, moved = ready["trimap"][0], ready["alpha"][0]
        assert (moved[trimap == 255] > 0.5).all() and (moved[trimap == 0] < 0.5).all() and (trimap == 128).any()


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
    with pytest.raises(InputError, match="masks of grey: got a uint8 array .* values 0..255, but accepted is 0 and 1"):
        make_sample("grey", np.zeros((8, 8)), np.zeros((8, 8)), np.eye(8, dtype=np.uint8)[None] * 255)


def test_the_paper_s_recipe_peaks_at_its_base_rate_after_one_epoch():
    recipe = paper_recipe(29)
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    assert recipe.steps == 700 and max(rates) == 5e-5 and rates.index(max(rates)) == 6


def test_the_same_seed_makes_the_same_network():
    first, second, other = (make_network("plain-unet", 1, widths=(4, 6), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first) and any(not torch.equal(first[k], other[k]) for k in first)


# ---- networks that read a trimap


class Halves(torch.nn.Module):
    "Alpha is the first colour where the trimap is unknown."

    kind, config = "halves", {}
    encode = staticmethod(lambda trimap: (trimap == 128)[None].astype(np.float32))

    def alpha(self, rgb, trimap):
        return rgb[:, :1] * trimap


def trimap_of(height, width):
    trimap = np.full((height, width), 128, np.uint8)
    trimap[:, : width // 3], trimap[:, -(width // 3) :] = 0, 255
    return trimap


@pytest.mark.parametrize("size", [(3, 3), (40, 70), (33, 101)])
def test_a_trimap_is_cut_and_flipped_with_its_image_and_what_it_knows_stands(size):
    image, trimap = np.random.default_rng(0).random(size, np.float32), trimap_of(*size)
    alpha = predict(Halves(), image, trimap, tile=32, overlap=8).alpha
    np.testing.assert_allclose(alpha, np.select([trimap == 0, trimap == 255], [0, 1], image), atol=1e-6)


@pytest.mark.parametrize("kind, options", [("fba", dict(width=4, blocks=(1, 1, 1, 1))),
                                           ("matteformer", dict(width=24, depths=(1, 1, 1, 1), decoder_width=4))])
def test_they_are_saved_loaded_and_answer_as_their_own_functions_do(kind, options, tmp_path):
    from medmatting import predict_fba, predict_matteformer

    save_weights(tmp_path / "w.safetensors", make_network(kind, 1, **options), CARD)
    net, _ = load_network(tmp_path / "w.safetensors")
    image, trimap = np.random.default_rng(0).random((37, 50), np.float32), trimap_of(37, 50)
    alone = predict_fba(net, image, trimap).alpha if kind == "fba" else predict_matteformer(net, image, trimap)
    np.testing.assert_allclose(predict(net, image, trimap, flips=False).alpha, alone, atol=1e-5)


def test_a_trimap_that_is_missing_or_not_wanted_is_refused():
    with pytest.raises(InputError, match="a trimap for halves"):
        predict(Halves(), np.zeros((9, 9), np.uint8))
    with pytest.raises(InputError, match="no trimap for"):
        net = Brightness()
        net.kind = "plain-unet"
        predict(net, np.zeros((9, 9), np.uint8), trimap_of(9, 9))
    with pytest.raises(InputError, match="shape"):
        predict(Halves(), np.zeros((9, 9), np.uint8), trimap_of(9, 8))


@pytest.mark.parametrize("content, message", [({"a.conv_up4.b": torch.ones(1)}, "tensors missing"), ({"W": torch.ones(1)}, "neither FBA nor MatteFormer")])
def test_a_published_file_that_does_not_fit_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=message):
        load_network(tmp_path / "weights.pth")


# ---- zoom


@pytest.mark.parametrize("zoom", [0.5, 2.0, 0.01])
def test_zoom_shows_another_size_and_answers_in_the_old(zoom):
    seen = []

    class Watched(Brightness):
        def forward(self, image):
            seen.append(tuple(image.shape[2:]))
            return super().forward(image)

    smooth = np.linspace(0, 1, 60)[:, None] * np.ones(40)
    alpha = predict(Watched(), smooth, zoom=zoom).alpha
    assert alpha.shape == (60, 40) and set(seen) == {(max(round(60 * zoom), 1), max(round(40 * zoom), 1))}
    if zoom >= 0.5:
        np.testing.assert_allclose(alpha, smooth, atol=0.02)


@pytest.mark.parametrize("zoom", [0, -1, float("nan"), float("inf"), 1e9, "2"])
def test_zoom_that_is_none_is_refused(zoom):
    with pytest.raises(InputError, match="zoom"):
        predict(Brightness(), np.zeros((9, 9)), zoom=zoom)


def test_the_card_says_the_zoom():
    assert suitable_zoom({"input": {"side": 100}}, (50, 200), (3.0, 3.0)) == 0.5
    assert suitable_zoom({"input": {"spacing_mm": 0.5}}, (50, 200), (0.25, 1.0)) == 1.0
    assert suitable_zoom({"input": {"spacing_mm": 0.5}}, (50, 200)) == suitable_zoom({}, (50, 200), (0.7, 0.7)) == 1


def test_a_network_fresh_from_training_answers_as_one_that_was_read():
    from medmatting.plain_unet import PlainUNet

    torch.manual_seed(0)
    net, image = PlainUNet(1, (4, 6)), np.random.default_rng(0).random((40, 40))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    said = predict(net.train(), image, tile=24, overlap=8).alpha
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert np.array_equal(said, predict(net.eval(), image, tile=24, overlap=8).alpha)


# ---- the models that come with the package

MODELS = Path(medmatting.__file__).parent / "data" / "models"


def test_the_shipped_models_are_small_hashed_and_have_a_card():
    sums = dict(line.split()[::-1] for line in (MODELS / "SHA256SUMS").read_text().splitlines())
    assert {path.name for path in MODELS.iterdir()} == {*sums, "README.md", "SHA256SUMS"} and len(sums) == len(SHIPPED)
    assert all(hashlib.sha256((MODELS / name).read_bytes()).hexdigest() == sha256 for name, sha256 in sums.items())
    assert all((MODELS / name).stat().st_size < (3.2e6 if name == "nodules3d.safetensors" else 1.5e6) for name in sums)
    for name in SHIPPED.values():
        net, card = load_shipped(name)
        assert net.config["channels"] == (3 if name == "skin" else 1) and not net.training and {*CARD, "input", "short"} <= card.keys()
        mine, nothing = card["metrics"]["this model"], card["metrics"]["0 everywhere"]
        assert "Not for clinical use" in card["limits"] and mine["dice"] > nothing["dice"]
        assert mine["mae"] < nothing["mae"] or name == "nodules3d" and "times that of 0 everywhere" in card["limits"]
        assert all(value.isfinite().all() for value in net.state_dict().values())
    with pytest.raises(InputError, match="'nodules' or 'skin' or 'nodules3d'"):
        load_shipped("brain")


def test_the_model_for_nodules_sees_a_nodule_and_no_nodule_in_empty_lung():
    hu = np.full((64, 64), -850.0)
    y, x = np.mgrid[:64, :64]
    inside = np.hypot(y - 30, x - 34) < 9
    net, _ = load_shipped("nodules")
    said = predict(net, ((np.where(inside, 30.0, hu) + 1000) / 1400).clip(0, 1))
    assert said.alpha[np.hypot(y - 30, x - 34) < 7].mean() > 0.4 and said.alpha[~inside].mean() < 0.1
    assert predict(net, ((hu + 1000) / 1400)).alpha.mean() < 0.05 and 0 <= said.uncertainty.min() <= said.uncertainty.max() <= 1


@pytest.mark.parametrize("radius", [6, 9, 20])  # voxels of half a millimetre
def test_the_model_for_volumes_sees_balls_of_6_to_20_mm(radius):
    from medmatting.predict3d import predict_volume

    net, _ = load_shipped("nodules3d")
    distance = np.sqrt(((np.indices((64, 64, 64)) - 32) ** 2).sum(0))
    ball = predict_volume(net, np.where(distance < radius, 30.0, -850), spacing=(0.5, 0.5, 0.5)).alpha.array
    assert ball[distance < radius - 2].mean() > 0.5 and ball[distance > radius + 5].mean() < 0.05


def test_the_model_for_volumes_sees_nothing_in_empty_lung():
    from medmatting.predict3d import predict_volume

    net, card = load_shipped("nodules3d")
    empty = predict_volume(net, np.full((48, 48, 48), -850.0), spacing=(0.5, 0.5, 0.5)).alpha.array
    assert empty.max() < 0.1 and card["input"] == {"hu_range": [-1000, 400], "spacing_mm": 0.5}


def test_the_model_for_skin_sees_a_lesion_it_was_not_trained_on():
    from medmatting.photographs import skin

    photograph = skin("ISIC_0014616")
    net, card = load_shipped("skin")
    alpha = predict(net, photograph.image, zoom=suitable_zoom(card, photograph.mask.shape)).alpha
    assert alpha[photograph.mask].mean() > alpha[~photograph.mask].mean() + 0.3


def test_3dmm_is_read_back_and_does_not_answer_slices(tmp_path):
    from medmatting.matting3d import Matting3D

    net = Matting3D(widths=(2, 4), units=1, guided=False)
    save_weights(tmp_path / "w.safetensors", net, CARD)
    again, _ = load_network(tmp_path / "w.safetensors")
    volume = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(volume).alpha, net.eval()(volume).alpha)
    with pytest.raises(InputError, match="predict_volume"):
        predict(again, np.zeros((8, 8), np.float32))
