"""Samples, crops, recipe and prediction of 3DMM."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_training3d
import torch

from medmatting.checks import InputError
from medmatting.hounsfield import scale_hu
from medmatting.matting3d import Matting3D
from medmatting.predict import spread
from medmatting.predict3d import predict_volume
from medmatting.recipes3d import Crops, Objective3D, Prepare3D, make_sample3d, paper_recipe3d
from medmatting.train import TrainingError, train
from medmatting.volumes import Volume

SMALL = dict(widths=(2, 4), units=1, convs=1)


def ball(side=16, radius=4.0, seed=0):
    "A sample: a soft ball in noise."
    random, axes = np.random.default_rng(seed), np.ogrid[tuple(slice(-(side - 1) / 2, side / 2) for _ in range(3))]
    distance = np.sqrt(sum(axis**2 for axis in axes))
    alpha = np.clip((radius + 1 - distance) / 2, 0, 1)
    masks = np.stack([distance < radius + d for d in (-1, 0, 0, 1)])
    return make_sample3d(f"ball{seed}", alpha * 900 - 850 + random.normal(0, 20, alpha.shape), alpha, masks)


def test_sample_holds_overlap_and_union_of_the_readers():
    sample = ball()
    assert sample["overlap"].sum() < sample["union"].sum() and ((sample["overlap"] > 0) <= (sample["union"] > 0)).all()
    assert scale_hu(np.array([-2000, -1000, -300, 400, 3000])).tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("crops", [Crops((8, 8, 8)), Crops((8, 8, 8), aimed=0), Crops((24, 12, 20)), Crops((1, 8, 8))])
def test_crops_have_their_size_and_keep_to_the_ranges(crops):
    for seed in range(20):
        crop = Prepare3D(crops)(ball(), torch.Generator().manual_seed(seed))
        for name in ("image", "alpha", "overlap", "union"):
            assert crop[name].shape == (1, *crops.size) and 0 <= crop[name].min() and crop[name].max() <= 1
        assert set(crop["overlap"].unique().tolist()) <= {0, 1} and (crop["overlap"] <= crop["union"]).all()


def test_each_part_of_the_augmentation_changes_the_crop_and_moves_all_maps_together():
    sample = ball()
    sample["image"][0, :, :8] += 0.1  # not symmetric
    still = dict(flip=0, rotation=0, aimed=0)
    plain = Prepare3D(Crops((16, 16, 16), **still))(sample, torch.Generator().manual_seed(0))
    for change in (dict(flip=1), dict(rotation=90.0)):
        moved = Prepare3D(Crops((16, 16, 16), **{**still, **change}))(sample, torch.Generator().manual_seed(3))
        assert (moved["image"] - plain["image"]).abs().max() > 0.05, change
    sample["image"] = sample["alpha"].clone()
    moved = Prepare3D(Crops((12, 12, 12)))(sample, torch.Generator().manual_seed(0))
    assert torch.equal(moved["image"].clamp(0, 1), moved["alpha"])


def test_aimed_crops_contain_the_nodule_where_others_miss_it():
    sample = ball(side=40, radius=2.0)
    hits = {aimed: sum(bool(Prepare3D(Crops((10, 10, 10), aimed=aimed))(sample, torch.Generator().manual_seed(s))["union"].any()) for s in range(40))
            for aimed in (0.0, 1.0)}  # fmt: skip
    assert hits[1.0] >= 38 and hits[0.0] <= 12


def test_volumes_smaller_than_the_crop_repeat_their_border():
    sample = ball(side=8)
    crop = Prepare3D(Crops((16, 8, 8), flip=0, rotation=0))(sample, torch.Generator().manual_seed(0))
    assert torch.allclose(crop["image"][:, 0], sample["image"][:, 0], atol=1e-5) and torch.allclose(crop["image"][:, 3], crop["image"][:, 0], atol=1e-5)


def test_trains_with_the_loop_of_the_2d_networks_and_continues(tmp_path):
    def run(folder, steps_then_stop=None):
        torch.manual_seed(0)
        objective, told = Objective3D(Matting3D(**SMALL)), []

        def watch(step, model):
            told.append(step)
            if step + 1 == steps_then_stop:
                raise KeyboardInterrupt
            return {}

        recipe = paper_recipe3d(2, epochs=3, batch=2, rate=0.01)
        history = train(objective, [ball(seed=s) for s in range(2)], recipe, folder, Prepare3D(Crops((8, 8, 8))), save_every=1, watch=watch, progress=False)
        return history, objective.net.state_dict()

    history, whole = run(tmp_path / "whole")
    assert len(history) == 3 and set(history[0]) == {"step", "loss", "overlap", "union", "alpha", "grad"}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", steps_then_stop=2)
    _, continued = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_loss_that_is_no_number_names_step_and_case(tmp_path):
    sample = ball()
    sample["alpha"][:] = torch.nan
    with pytest.raises(TrainingError, match="step 0.*ball0"):
        train(Objective3D(Matting3D(**SMALL)), [sample], paper_recipe3d(1, epochs=1, batch=1), tmp_path, progress=False)


def test_the_recipe_is_the_papers():
    recipe = paper_recipe3d(605)
    assert (recipe.batch, recipe.rate, recipe.weight_decay, recipe.warmup, recipe.steps) == (16, 3e-4, 5e-5, 37, 300 * 37)


@pytest.mark.parametrize("shape, spacing", [((20, 33, 17), (1.2, 0.7, 0.7)), ((5, 9, 9), (2.5, 0.6, 0.6)), ((1, 40, 40), (3.0, 0.5, 0.5))])
def test_one_tile_and_many_agree_where_the_network_looks_at_single_voxels(shape, spacing):
    net = Matting3D(widths=(2,), units=1, convs=1).eval()
    for layer in net.modules():  # only the middle tap
        if isinstance(layer, torch.nn.Conv3d) and layer.kernel_size[0] == 3:
            with torch.no_grad():
                layer.weight *= torch.nn.functional.pad(torch.ones(1, 1, 1), [1] * 6)
    smooth = np.broadcast_to(np.linspace(-800, 0, shape[1], dtype=np.float32)[None, :, None], shape).copy()
    ct = Volume(smooth, spacing, unit="HU")
    whole = predict_volume(net, ct, tile=96).alpha.array
    tiled = predict_volume(net, ct, tile=10, overlap=4).alpha.array
    assert whole.shape == shape and whole.dtype == np.float32 and np.isfinite(whole).all()
    assert np.abs(tiled - whole)[:, 2:-2].max() < 0.02 * max(np.ptp(whole), 0.1)


@pytest.mark.parametrize("length, tile, overlap", [(1, 5, 2), (5, 5, 2), (6, 5, 4), (97, 13, 0), (97, 13, 12)])
def test_intervals_cover_an_axis(length, tile, overlap):
    parts = spread(length, tile, overlap)
    assert parts[0].start == 0 and parts[-1].stop == length
    assert all(a.stop - b.start >= overlap for a, b in zip(parts, parts[1:])) and all(p.stop - p.start == min(tile, length) for p in parts)


@pytest.mark.parametrize("shape", [(24, 24, 24), (36, 24, 48)])
def test_tiles_are_put_together_as_monai_does_with_the_same_weights(shape):
    "On the network's own grid, where tiles divide it evenly, the sliding window of MONAI is the same sum."
    from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    net = Matting3D(widths=(2, 3), units=1, convs=1).eval()
    ct = Volume(np.random.default_rng(0).uniform(-1000, 400, shape).astype(np.float32), (0.5,) * 3, unit="HU")
    ours = predict_volume(net, ct, tile=24, overlap=12).alpha.array
    near = np.minimum(np.arange(24), np.arange(24)[::-1]) + 0.5
    weights = torch.tensor(near[:, None, None] * near[:, None] * near, dtype=torch.float32)
    with torch.inference_mode():
        theirs = sliding_window_inference(torch.from_numpy(scale_hu(ct.array))[None, None], (24,) * 3, 1, lambda image: net(image).alpha,
                                          overlap=0.5, roi_weight_map=weights)[0, 0].numpy()
    assert np.ptp(theirs) > 1e-3 and np.abs(ours - theirs).max() < 1e-4


PEAK = """
import resource, sys
import numpy as np, torch
from medmatting.matting3d import Matting3DOutput
from medmatting.predict3d import predict_volume
from medmatting.volumes import Volume

class Stub(torch.nn.Module):
    kind, config = "3dmm", dict(widths=[1])
    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
    def forward(self, image):
        return Matting3DOutput(image, image, image)

torch.set_num_threads(1)
for slices in (96, 240):
    array = np.empty((slices, 192, 192), np.int16)
    array[:] = np.arange(-500, -308)
    predict_volume(Stub(), Volume(array, (1.0, 0.5, 0.5), unit="HU"), overlap=8, work=sys.argv[1])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_grows_with_the_ct_and_its_answer_only(tmp_path):
    "Twice the answer in float32 holds the answer and the CT in int16; a copy of the volume at 0.5 mm alone would be twice the answer more."
    freed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}  # what is freed leaves the process, so that the peak is what was held
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True, env=freed)
    small, large = map(int, done.stdout.split())
    answer = (240 - 96) * 192 * 192 * 4  # bytes that the longer one has more
    assert (large - small) / answer < 2, (small, large)


def test_rows_of_other_weights_are_not_used(tmp_path):
    ct = Volume(np.random.default_rng(0).normal(-500, 100, (12, 12, 12)).astype(np.float32), (1.0, 1.0, 1.0), unit="HU")
    answers = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = Matting3D(**SMALL).eval()
        answers.append((predict_volume(net, ct, work=tmp_path).alpha.array, predict_volume(net, ct).alpha.array))
    assert all(np.array_equal(kept, fresh) for kept, fresh in answers) and not np.array_equal(answers[0][0], answers[1][0])


@pytest.mark.parametrize("spacing_mm", [None, 0, -1, float("nan"), float("inf"), (0.5, 0.5, 0.5), "half"])
def test_a_grid_that_is_no_number_of_mm_is_refused(spacing_mm):
    with pytest.raises(InputError, match="spacing_mm: got"):
        predict_volume(Matting3D(**SMALL), np.full((4, 4, 4), -500.0), spacing=1, spacing_mm=spacing_mm)


def test_a_network_fresh_from_training_answers_as_one_that_was_read():
    torch.manual_seed(0)
    net = Matting3D(**SMALL)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ct = Volume(np.random.default_rng(0).normal(-500, 100, (12, 12, 12)).astype(np.float32), (1.0, 1.0, 1.0), unit="HU")
    said = predict_volume(net, ct, tile=12, overlap=3).alpha.array
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert np.array_equal(said, predict_volume(net.eval(), ct, tile=12, overlap=3).alpha.array)


def test_a_damaged_row_is_made_again(tmp_path):
    ct = Volume(np.random.default_rng(0).normal(-500, 100, (12, 12, 12)).astype(np.float32), (1.0, 1.0, 1.0), unit="HU")
    net = Matting3D(**SMALL).eval()
    whole = predict_volume(net, ct, tile=12, overlap=3, work=tmp_path).alpha.array
    rows = sorted(tmp_path.rglob("row*.npz"))
    rows[0].write_bytes(rows[0].read_bytes()[:100])
    rows[1].write_bytes(b"")
    assert np.array_equal(predict_volume(net, ct, tile=12, overlap=3, work=tmp_path).alpha.array, whole)


def test_refusals_name_what_came():
    net, array = Matting3D(**SMALL).eval(), np.zeros((4, 4, 4), np.float32)
    for call, told in ((lambda: predict_volume(net, array), "spacing"), (lambda: predict_volume(net, Volume(array, (1, 1, 1))), "HU"),
                       (lambda: predict_volume(net, array * np.nan, spacing=(1, 1, 1)), "ct"), (lambda: predict_volume(torch.nn.Identity(), array), "3dmm"),
                       (lambda: Crops((0, 4, 4)), "size"), (lambda: make_sample3d("x", array, array + 2, array[None] > 0), "alpha"),
                       (lambda: make_sample3d("x", array - 500, array, array[None][:0] > 0), r"masks \(0, 4, 4, 4\)"),
                       (lambda: predict_volume(net, array + np.linspace(0, 1, 4, dtype=np.float32), spacing=(1, 1, 1)), r"scaled to \[0, 1\] already"),
                       (lambda: predict_volume(net, array.astype(np.uint8), spacing=(1, 1, 1)), "signed integers or floats"),
                       (lambda: predict_volume(net, array - 500, spacing=(1, 1, 1), hu_range=(400, -1000)), "hu_range"),
                       (lambda: make_sample3d("x", array + np.linspace(0, 1, 4, dtype=np.float32), array, array[None] > 0), "x: got")):
        with pytest.raises(InputError, match=told):
            call()


def started(command, tmp_path):
    "Weights that the processes of a command write down."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, str(Path(__file__).parent / "toy_training3d.py"), str(tmp_path / "two"), str(tmp_path / "two.pt")],
                           env=env, capture_output=True, text=True, timeout=500)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return torch.load(tmp_path / "two.pt", weights_only=True)


@pytest.mark.parametrize("starter", ["spawned", "torchrun"])
def test_two_processes_equal_one_with_batch_normalisation(tmp_path, starter):
    command = [sys.executable] if starter == "spawned" else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    torch.manual_seed(0)
    before, alone = Objective3D(Matting3D(**SMALL)).state_dict(), toy_training3d.run(tmp_path / "alone").state_dict()
    two = started(command, tmp_path)
    history = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["history"] for name in ("alone", "two")]
    for one, other in zip(*history, strict=True):  # sums of two halves are rounded otherwise than a sum of all
        assert other == pytest.approx(one, rel=2e-5)
    assert len(history[0]) == 4 and two.keys() == alone.keys()
    for name in (name for name in two if name.endswith("weight")):  # a bias before a normalisation has no gradient but rounding
        assert (alone[name] - before[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(two[name], alone[name], rtol=1e-4, atol=2e-5, msg=lambda text: f"{name}: {text}")
