"""`medmatting train` and `medmatting predict` as a user runs them: killed, resumed, refused, on folders with bad files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import medmatting as mm
import miniature
import miniature_dicom
import miniature_volumes
from medmatting.cli import main
from medmatting.matting_sets import matting_set
from medmatting.predict import load_network, load_shipped, predict, suitable_zoom
from medmatting.recipes import make_network
from medmatting.train import save_weights

CARD = dict(data="", recipe={}, metrics={}, licence="", limits="")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return miniature.write_set(tmp_path_factory.mktemp("data"), "lidc", miniature.lidc_cases())


def run(*words):
    return main([str(word) for word in words])


def train_words(data, folder, *more, kind="region-aware", steps=4):
    return ["train", kind, "--data", "lidc", "--fold", 1, "--output", folder, "--data-folder", data, "--size", "small",
            "--steps", steps, "--batch", 2, "--rate", 1e-3, "--save-every", 1, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    assert run(*train_words(data, folder)) == 0
    return folder


def test_a_run_leaves_everything(trained, data):
    cases = matting_set("lidc", data).fold(1).test
    names = {path.name for path in trained.iterdir()}
    assert names == {"run.json", "checkpoint.pt", "history.csv", "curves.png", "predictions", "scores.csv", "weights.safetensors"}
    assert {path.name for path in (trained / "predictions").iterdir()} == {f"{c}{end}.png" for c in cases for end in ("", "_uncertainty")}
    assert len((trained / "history.csv").read_text().splitlines()) == 5
    net, card = load_network(trained / "weights.safetensors")
    assert "LIDC slices" in card["data"] and card["recipe"]["recipe"]["steps"] == 4 and card["metrics"]["cases"] == len(cases)


def test_scores_are_those_of_the_predictions(trained, data):

    published, table = matting_set("lidc", data), pd.read_csv(trained / "scores.csv").set_index("case")
    net, card = load_network(trained / "weights.safetensors")
    for case, row in table.iterrows():
        sample, region = published.samples[case], published.regions[case]
        alpha = predict(net, sample["image"][0].numpy()).alpha
        stored = mm.read(trained / "predictions" / f"{case}.png").array / 65535
        np.testing.assert_allclose(stored, alpha, atol=1e-5)
        truth = sample["alpha"][0].numpy()
        assert row.sad == pytest.approx(np.abs(alpha - truth)[region].sum() / 1000, abs=2 / 255 * region.sum() / 1000)
        assert row.pixels == region.sum()
    assert card["metrics"]["mse"] == pytest.approx(table.mse.mean())


def test_killed_and_resumed_it_ends_with_the_same_weights(trained, data, tmp_path):
    folder = tmp_path / "killed"
    words = [str(word) for word in train_words(data, folder)]
    command = [sys.executable, "-m", "medmatting", *words]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "weights.safetensors").exists()
    assert run(*words) == 0
    again, whole = (load_file(place / "weights.safetensors") for place in (folder, trained))
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert (folder / "scores.csv").read_bytes() == (trained / "scores.csv").read_bytes()


def test_a_finished_run_is_left_alone(trained, data):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert run(*train_words(data, trained)) == 0
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def said(capsys) -> str:
    "The one sentence on standard error."
    error = capsys.readouterr().err
    assert error.startswith("medmatting: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize("change, message", [
    (["--fold", 4], "fold: got 4, but accepted is a whole number from 0 to 3"),
    (["--data", "lung"], "data: got 'lung', but accepted is brain-growth, lidc"),
    (["--size", "large"], "size: got 'large'"),
    (["--pseudo", "dice"], "pseudo: got 'dice'"),
    (["--weighting", "equal"], "weighting: got 'equal'"),
    (["--upsampling", "cubic"], "upsampling"),
    (["--coordinates", "absolute"], "coordinates: got 'absolute'"),
    (["--precision", "8"], "precision: got '8'"),
    (["--device", "tpu"], "device: got 'tpu'"),
    (["--batch", 0], "--batch: got 0"),
    (["--rate", -1], "rate: got -1.0"),
])
def test_refusals_of_train_leave_nothing(data, tmp_path, capsys, change, message):
    assert run(*train_words(data, tmp_path / "run"), *change) == 2
    assert message in said(capsys) and not (tmp_path / "run").exists()


def test_a_network_without_upsampling_refuses_it_and_unknown_ones_are_named(data, tmp_path, capsys):
    assert run(*train_words(data, tmp_path / "run", "--upsampling", "bilinear", kind="plain-unet")) == 2
    assert "upsampling: got it for 'plain-unet'" in said(capsys)
    assert run(*train_words(data, tmp_path / "run", kind="unet")) == 2
    assert "kind: got 'unet'" in said(capsys) and not (tmp_path / "run").exists()


def test_data_that_are_not_here(tmp_path, capsys):
    assert run(*train_words(tmp_path, tmp_path / "run")) == 1
    assert "lidc_attributes.zip and trimap_LIDC.zip not found" in said(capsys)


def test_the_folder_of_another_run_is_not_touched(trained, data, tmp_path, capsys):
    before = (trained / "run.json").read_bytes()
    assert run(*train_words(data, trained, "--seed", 5)) == 2
    assert "the folder of another run (recipe" in said(capsys) and (trained / "run.json").read_bytes() == before
    other = miniature.lidc_cases()
    other["0_slice0"]["alpha"] = other["0_slice0"]["alpha"] // 2
    assert run(*train_words(miniature.write_set(tmp_path / "other", "lidc", other), trained)) == 2
    assert "(samples '" in said(capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert run(*train_words(data, tmp_path / "full")) == 2
    assert "holds other files" in said(capsys) and len(list((tmp_path / "full").iterdir())) == 1


def test_a_damaged_checkpoint_is_named(data, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(*train_words(data, folder, kind="plain-unet", steps=2)) == 0
    (folder / "weights.safetensors").unlink()
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:1000])
    capsys.readouterr()
    assert run(*train_words(data, folder, kind="plain-unet", steps=2)) == 1
    assert "checkpoint.pt: not a whole checkpoint" in said(capsys)


def test_two_processes_train_and_tell_their_refusals(data, tmp_path):
    words = [str(w) for w in train_words(data, tmp_path / "two", "--processes", 2, kind="plain-unet", steps=2)]
    done = subprocess.run([sys.executable, "-m", "medmatting", *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "weights.safetensors").exists() and "mean sad" in done.stdout


# ---- predict


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Untrained weights of the three kinds."
    folder = tmp_path_factory.mktemp("weights")
    for kind in ("plain-unet", "region-aware"):
        save_weights(folder / f"{kind}.safetensors", make_network(kind, 1, "small"), CARD)
    return folder


@pytest.fixture
def picture(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (21, 34), np.uint8)
    mm.write(tmp_path / "in.png", image)
    return image


@pytest.mark.parametrize("bits", [8, 16])
def test_predict_equals_the_function(weights, picture, tmp_path, bits):
    assert run("predict", tmp_path / "in.png", "-o", tmp_path / "a.png", "--uncertainty", tmp_path / "u.png",
               "--weights", weights / "region-aware.safetensors", "--bits", bits) == 0
    expected = predict(load_network(weights / "region-aware.safetensors")[0], picture)
    for name, values in (("a", expected.alpha), ("u", expected.uncertainty)):
        stored = mm.read(tmp_path / f"{name}.png").array
        assert stored.dtype == f"uint{bits}" and np.array_equal(stored, np.round(values.astype(float).clip(0, 1) * (2**bits - 1)))


def test_options_of_predict_reach_the_function(weights, picture, tmp_path):
    net = load_network(weights / "plain-unet.safetensors")[0]
    assert run("predict", tmp_path / "in.png", "-o", tmp_path / "a.npy", "--weights", weights / "plain-unet.safetensors",
               "--no-flips", "--tile", 16) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), predict(net, picture, flips=False, tile=16, overlap=4).alpha)


def test_geometry_and_hounsfield_units_of_one_slice(weights, tmp_path, capsys):
    hu = np.random.default_rng(0).normal(-700, 200, (1, 20, 24)).astype(np.float32)
    slice_ = mm.Volume(hu, (2.5, 0.7, 0.7), (1, 2, 3), unit="HU")
    mm.write(tmp_path / "ct.nii.gz", slice_)
    words = ["predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "a.nii.gz", "--weights", weights / "plain-unet.safetensors"]
    assert run(*words) == 2 and "add --hu-range -1000 400" in said(capsys) and not (tmp_path / "a.nii.gz").exists()
    assert run(*words, "--hu-range", -1000, 400) == 0
    alpha = mm.read(tmp_path / "a.nii.gz")
    assert alpha.spacing == pytest.approx(slice_.spacing) and np.allclose(alpha.origin, slice_.origin) and alpha.unit == ""
    net = load_network(weights / "plain-unet.safetensors")[0]
    np.testing.assert_allclose(alpha.array[0], predict(net, ((hu[0] + 1000) / 1400).clip(0, 1)).alpha, atol=1e-6)


def test_a_volume_is_answered_slice_by_slice(weights, tmp_path, capsys):
    hu = np.random.default_rng(0).normal(-700, 200, (3, 20, 24)).astype(np.float32)
    mm.write(tmp_path / "ct.nii.gz", mm.Volume(hu, (2.5, 0.7, 0.7), (1, 2, 3), unit="HU"))
    words = ["predict", tmp_path / "ct.nii.gz", "--weights", weights / "region-aware.safetensors", "--hu-range", -1000, 400]
    assert run(*words, "-o", tmp_path / "a.png") == 2 and "a volume of 3 slices" in said(capsys) and not (tmp_path / "a.png").exists()
    assert run(*words, "-o", tmp_path / "a.nii.gz", "--uncertainty", tmp_path / "u.nrrd") == 0
    alpha, entropy, net = mm.read(tmp_path / "a.nii.gz"), mm.read(tmp_path / "u.nrrd"), load_network(weights / "region-aware.safetensors")[0]
    assert np.allclose(alpha.origin, (1, 2, 3)) and alpha.spacing == pytest.approx((2.5, 0.7, 0.7))
    for z in range(3):
        expected = predict(net, ((hu[z] + 1000) / 1400).clip(0, 1))
        np.testing.assert_allclose(alpha.array[z], expected.alpha, atol=1e-6)
        np.testing.assert_allclose(entropy.array[z], expected.uncertainty.clip(0, 1), atol=1e-6)


def test_a_folder_goes_on_past_a_bad_file_and_resumes(weights, tmp_path, capsys):
    folder, out = tmp_path / "images", tmp_path / "alphas"
    for i in range(3):
        mm.write(folder / f"{i}.png", np.full((16, 16), 80 * i, np.uint8))
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("left alone")
    words = ["predict", folder, "-o", out, "--uncertainty", tmp_path / "maps", "--weights", weights / "region-aware.safetensors"]
    assert run(*words) == 1
    assert str(folder / "1.png") in said(capsys)
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "maps").iterdir()} == {"0.png", "2.png"}
    first = (out / "0.png").stat().st_mtime_ns
    mm.write(folder / "1.png", np.full((16, 16), 80, np.uint8))
    assert run(*words) == 0
    assert "3 images, 2 done before" in capsys.readouterr().out and (out / "0.png").stat().st_mtime_ns == first
    assert run(*words, "--overwrite") == 0 and (out / "0.png").stat().st_mtime_ns > first


def test_refusals_of_predict(weights, picture, tmp_path, capsys):
    words = ["predict", tmp_path / "in.png", "-o", tmp_path / "a.png", "--weights", weights / "plain-unet.safetensors"]
    (tmp_path / "other.safetensors").write_bytes(b"none")
    (tmp_path / "empty").mkdir()
    mm.write(tmp_path / "jpg" / "b.png", picture)
    mm.write(tmp_path / "jpg2" / "b.png", picture)
    for change, message in [
        (["--weights", tmp_path / "other.safetensors"], "not a whole weights file"),
        (["--weights", tmp_path / "none.safetensors"], "none.safetensors, but accepted is a file that exists"),
        (["--uncertainty", tmp_path / "u.png"], "--uncertainty: got it with weights of plain-unet"),
        (["--uncertainty", tmp_path / "a.png"], "another place than --output"),
        (["--tile", 0], "tile, overlap"),
    ]:
        assert run(*words, *change) == 2
        assert message in said(capsys) and not (tmp_path / "a.png").exists() and not (tmp_path / "u.png").exists()
    assert run("predict", tmp_path / "empty", *words[2:]) == 2 and "a folder without images" in said(capsys)
    assert run("predict", tmp_path / "jpg", tmp_path / "jpg2", *words[2:]) == 2 and "which would go to one file" in said(capsys)
    (tmp_path / "a.png").write_bytes(b"older")
    assert run(*words) == 2 and "add --overwrite" in said(capsys) and (tmp_path / "a.png").read_bytes() == b"older"
    assert run("predict", tmp_path / "jpg", *words[2:]) == 2 and "a.png, a file" in said(capsys)


def test_matte_takes_the_precision(tmp_path):
    from medmatting.photographs import skin

    image = skin("ISIC_0014616")
    mm.write(tmp_path / "i.png", image.image[::4, ::4])
    mm.write(tmp_path / "m.png", image.mask[::4, ::4])
    words = ["matte", tmp_path / "i.png", "--mask", tmp_path / "m.png", "--band-mm", 2, "-o", tmp_path / "a.png", "--info", tmp_path / "i.json"]
    assert run(*words, "--precision", "half") == 2
    assert run(*words, "--precision", "double") == 0 and json.loads((tmp_path / "i.json").read_text())["precision"] == "double"


# ---- predict with a model of the package


def test_without_weights_the_channels_choose_the_model_and_it_is_named(tmp_path, capsys):
    from medmatting.photographs import skin

    colour = skin("ISIC_0014616").image[::8, ::8]
    for name, image, model in (("colour", colour, "skin"), ("grey", colour[..., 0], "nodules")):
        mm.write(tmp_path / f"{name}.png", image)
        assert run("predict", tmp_path / f"{name}.png", "-o", tmp_path / f"{name}_a.npy", "--uncertainty", tmp_path / f"{name}_u.npy") == 0
        net, card = load_shipped(model)
        assert f"the package's model {model!r}, {card['short']}" in capsys.readouterr().out
        expected = predict(net, image, zoom=suitable_zoom(card, image.shape[:2]))
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}_a.npy", allow_pickle=False), expected.alpha)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}_u.npy", allow_pickle=False), expected.uncertainty.clip(0, 1))
    assert run("predict", tmp_path / "grey.png", "-o", tmp_path / "b.npy", "--weights", "skin") == 0


def test_hounsfield_units_are_scaled_and_zoomed_as_the_model_was_trained(tmp_path, capsys):
    hu = np.random.default_rng(0).normal(-700, 200, (1, 20, 24)).astype(np.float32)
    mm.write(tmp_path / "ct.nii.gz", mm.Volume(hu, (2.5, 0.75, 0.75), unit="HU"))
    assert run("predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "a.nii.gz") == 0
    expected = predict(load_shipped("nodules")[0], ((hu[0] + 1000) / 1400).clip(0, 1), zoom=1.5).alpha
    np.testing.assert_allclose(mm.read(tmp_path / "a.nii.gz").array[0], expected, atol=1e-5)
    assert run("predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "a.png", "--bits", 16) == 0  # one slice is a picture too
    np.testing.assert_allclose(mm.read(tmp_path / "a.png").array / 65535, expected, atol=2e-5)
    np.save(tmp_path / "hu.npy", hu[0])
    assert run("predict", tmp_path / "hu.npy", "-o", tmp_path / "b.npy", "--hu-range", -1000, 400, "--spacing", 0.75) == 0
    np.testing.assert_allclose(np.load(tmp_path / "b.npy", allow_pickle=False), expected, atol=1e-5)
    capsys.readouterr()
    assert run("predict", tmp_path / "hu.npy", "-o", tmp_path / "c.npy") == 2 and "hu_range" in said(capsys)
    assert run("predict", tmp_path / "hu.npy", "-o", tmp_path / "c.npy", "--hu-range", -1000, 400, "--spacing", 0) == 2 and "--spacing" in said(capsys)


def test_a_ct_of_several_slices_is_answered_in_3d_and_other_volumes_slice_by_slice(tmp_path, capsys):
    from medmatting.predict3d import predict_volume

    hu = np.random.default_rng(0).normal(-800, 60, (6, 20, 24)).astype(np.float32)
    hu[2:4, 8:14, 8:14] = 30
    volume = mm.Volume(hu, (1.5, 0.75, 0.75), unit="HU")
    mm.write(tmp_path / "ct.nii.gz", volume)
    mm.write(tmp_path / "mr.nii.gz", mm.Volume(np.clip(hu + 900, 0, 255).astype(np.uint8), volume.spacing))
    assert run("predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "a.nii.gz", "--union", tmp_path / "u.nii.gz") == 0
    assert "3dmm, the package's model 'nodules3d'" in capsys.readouterr().out
    expected = predict_volume(load_shipped("nodules3d")[0], mm.read(tmp_path / "ct.nii.gz", unit="HU"), maps=("alpha", "union"))
    for name, part in (("a", expected.alpha), ("u", expected.union)):
        np.testing.assert_allclose(mm.read(tmp_path / f"{name}.nii.gz").array, part.array, atol=1e-5)
    assert run("predict", tmp_path / "mr.nii.gz", "-o", tmp_path / "b.nii.gz") == 0 and "model 'nodules'" in capsys.readouterr().out
    assert run("predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "c.nii.gz", "--weights", "nodules") == 0


def test_a_folder_may_hold_colour_and_grey(tmp_path, capsys):
    mm.write(tmp_path / "in" / "grey.png", np.zeros((9, 8), np.uint8))
    mm.write(tmp_path / "in" / "colour.png", np.zeros((9, 8, 3), np.uint8))
    assert run("predict", tmp_path / "in", "-o", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "model 'skin'" in told and "model 'nodules'" in told and len(list((tmp_path / "out").iterdir())) == 2


def test_a_picture_of_the_other_number_of_channels_and_numbers_that_are_none_are_refused(tmp_path, capsys):
    mm.write(tmp_path / "i.png", np.zeros((9, 9, 3), np.uint8))
    assert run("predict", tmp_path / "i.png", "-o", tmp_path / "a.png", "--weights", "nodules") == 2 and "3 channels" in said(capsys)
    np.save(tmp_path / "nan.npy", np.full((9, 9), np.nan, np.float32))
    assert run("predict", tmp_path / "nan.npy", "-o", tmp_path / "a.png") == 2
    assert "NaN" in said(capsys) and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (1, 37), (33, 5, 3)])
def test_pictures_of_any_size_are_answered_in_that_size(shape, tmp_path):
    mm.write(tmp_path / "i.png", np.full(shape, 77, np.uint8))
    assert run("predict", tmp_path / "i.png", "-o", tmp_path / "a.png", "--uncertainty", tmp_path / "u.png", "--tile", 16) == 0
    assert mm.read(tmp_path / "a.png").array.shape == mm.read(tmp_path / "u.png").array.shape == shape[:2]


# ---- networks that read a trimap


@pytest.mark.parametrize("kind", ["fba", "matteformer"])
def test_networks_that_read_a_trimap_train_and_predict_from_the_command_line(kind, data, tmp_path, capsys):
    words = train_words(data, tmp_path / "run", kind=kind, steps=2)
    assert run(*words) == 0
    weights, (net, card) = tmp_path / "run" / "weights.safetensors", load_network(tmp_path / "run" / "weights.safetensors")
    assert net.kind == kind and card["metrics"]["cases"] == 2
    image, trimap = np.random.default_rng(0).integers(0, 256, (21, 34), np.uint8), np.full((21, 34), 128, np.uint8)
    trimap[:, :8], trimap[:, -8:] = 0, 255
    mm.write(tmp_path / "i" / "one.png", image)
    mm.write(tmp_path / "t" / "one.png", trimap)
    predicted = ["predict", tmp_path / "i" / "one.png", "-o", tmp_path / "a.npy", "--weights", weights]
    assert run(*predicted, "--trimap", tmp_path / "t" / "one.png") == 0
    alpha = np.load(tmp_path / "a.npy", allow_pickle=False)
    np.testing.assert_array_equal(alpha, predict(net, image, trimap).alpha)
    assert (alpha[trimap == 0] == 0).all() and (alpha[trimap == 255] == 1).all()
    assert run("predict", tmp_path / "i", "-o", tmp_path / "many", "--weights", weights, "--trimap", tmp_path / "t") == 0
    capsys.readouterr()
    assert run(*predicted, "--overwrite") == 2 and f"one for {kind}; give a file" in said(capsys)
    assert run("predict", tmp_path / "i" / "one.png", "-o", tmp_path / "b.png", "--trimap", tmp_path / "t" / "one.png") == 2
    assert "none for region-aware" in said(capsys)


def test_a_fold_of_one_case_is_refused_by_name(tmp_path, capsys):
    cases = {f"{patient}_slice0": case for patient, case in zip(range(4), miniature.lidc_cases().values())}
    for name, case in cases.items():
        case["series_uid"] = name
    data = miniature.write_set(tmp_path, "lidc", cases)
    assert run(*train_words(data, tmp_path / "run", kind="plain-unet", steps=2)) != 0
    assert "at least two cases in each part" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---- 3DMM


def volume_words(data, folder, *more, steps=4):
    "A small 3DMM on the miniature volumes."
    return ["train", "3dmm", "--data", data, "--fold", 0, "--output", folder, "--widths", 2, 4, "--units", 1, "--crop", 8, "--batch", 2,
            "--steps", steps, "--device", "cpu", "--save-every", 2, *more]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return miniature_volumes.write_volumes(tmp_path_factory.mktemp("volumes") / "set")


@pytest.fixture(scope="module")
def trained3d(volumes, tmp_path_factory):
    "The folder of a finished run."
    folder = tmp_path_factory.mktemp("3dmm") / "run"
    assert run(*volume_words(volumes, folder)) == 0
    return folder


def test_torchrun_starts_the_command_line_on_several_processes(volumes, trained3d, tmp_path):
    words = [str(word) for word in volume_words(volumes, tmp_path / "run")]
    code = "import sys; from medmatting.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable, "-c", code, *words]
    env = {**os.environ, "PYTHONPATH": str(Path(mm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    alone, two = (pd.read_csv(folder / "history.csv") for folder in (trained3d, tmp_path / "run"))
    np.testing.assert_allclose(two.loss, alone.loss, rtol=2e-4)  # sums of two halves are rounded otherwise than a sum of all


@pytest.fixture
def ct(tmp_path):
    "A CT of several slices on a grid of its own."
    hu = np.random.default_rng(1).normal(-700, 200, (7, 20, 24)).astype(np.float32)
    volume = mm.Volume(hu, (1.25, 0.7, 0.7), (1, 2, 3), unit="HU")
    mm.write(tmp_path / "ct.nii.gz", volume)
    return volume


def test_3dmm_trains_predicts_and_scores(volumes, trained3d):
    from medmatting.volume_sets import volume_set

    names = {path.name for path in trained3d.iterdir()}
    assert names == {"run.json", "checkpoint.pt", "history.csv", "curves.png", "predictions", "scores.csv", "weights.safetensors"}
    data, scores, history = volume_set(volumes), pd.read_csv(trained3d / "scores.csv"), pd.read_csv(trained3d / "history.csv")
    assert tuple(scores.case) == data.split(0).test and len(history) == 4 and history.validation.notna().sum() == 2
    case = data.case(scores.case[0])
    alpha = mm.read(trained3d / "predictions" / f"{case.name}.nii.gz")
    assert scores.sad[0] == pytest.approx(np.abs(alpha.array - case.alpha).sum(), rel=1e-4)
    net, card = load_network(trained3d / "weights.safetensors")
    assert net.config["widths"] == [2, 4] and net.config["guided"] and card["input"] == {"hu_range": [-1000, 400], "spacing_mm": 0.5}
    assert card["recipe"]["crops"]["size"] == [8, 8, 8] and card["recipe"]["recipe"]["steps"] == 4


def test_3dmm_killed_and_resumed_ends_with_the_same_weights(volumes, trained3d, tmp_path):
    words = [str(w) for w in volume_words(volumes, tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "-m", "medmatting", *words], stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "run" / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert run(*words) == 0
    weights, again = (load_network(folder / "weights.safetensors")[0].state_dict() for folder in (trained3d, tmp_path / "run"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_3dmm_without_masks_is_another_network(volumes, tmp_path):
    assert run(*volume_words(volumes, tmp_path / "run", "--no-masks", steps=1)) == 0
    assert not load_network(tmp_path / "run" / "weights.safetensors")[0].config["guided"]


@pytest.mark.parametrize("change, message", [
    (["--fold", 4], "split: got 4"),
    (["--crop", 0], "size: got"),
    (["--widths", 0, 4], "widths: got"),
    (["--units", 0], "units: got 0"),
    (["--size", "large"], "size: got 'large'"),
    (["--aimed", 2], "aimed: got 2.0"),
    (["--upsampling", "bilinear"], "--upsampling: got it for 3dmm"),
    (["--pseudo", "raters"], "--pseudo: got it for 3dmm"),
    (["--data", "lidc-like"], "which does not exist"),
])
def test_refusals_of_3dmm_leave_nothing(volumes, tmp_path, capsys, change, message):
    assert run(*volume_words(volumes, tmp_path / "run"), *change) == 2
    assert message in said(capsys) and not (tmp_path / "run").exists()


def test_a_2d_network_refuses_options_of_3dmm(data, tmp_path, capsys):
    assert run(*train_words(data, tmp_path / "run", "--crop", 8)) == 2
    assert "--crop: got it for region-aware" in said(capsys) and not (tmp_path / "run").exists()


def test_3dmm_answers_a_ct_as_the_function_does(trained3d, ct, tmp_path, capsys):
    from medmatting.predict3d import predict_volume

    words = ["predict", tmp_path / "ct.nii.gz", "--weights", trained3d / "weights.safetensors", "--tile", 8]
    assert run(*words, "-o", tmp_path / "a.nii.gz", "--overlap", tmp_path / "o.nrrd", "--union", tmp_path / "u.nii.gz") == 0
    expected = predict_volume(load_network(trained3d / "weights.safetensors")[0], ct, tile=8, overlap=2, maps=("alpha", "overlap", "union"))
    for path, said_ in zip(("a.nii.gz", "o.nrrd", "u.nii.gz"), expected):
        made = mm.read(tmp_path / path)
        assert made.spacing == pytest.approx(ct.spacing) and np.allclose(made.origin, ct.origin) and made.unit == ""
        np.testing.assert_allclose(made.array, said_.array, atol=1e-6)
    assert not list(tmp_path.glob(".*")) and "3dmm, weights" in capsys.readouterr().out


def test_3dmm_killed_while_predicting_goes_on_from_its_rows(trained3d, ct, tmp_path, monkeypatch):
    import medmatting.predict3d as module

    words = ["predict", tmp_path / "ct.nii.gz", "--weights", trained3d / "weights.safetensors", "--tile", 8, "-o", tmp_path / "a.nii.gz"]
    see, seen = module._see_tile, []

    def stop_in_the_second_row(net, volume, box, **settings):
        seen.append(box[0].start)
        if len(set(seen)) == 2:
            raise KeyboardInterrupt
        return see(net, volume, box, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_see_tile", stop_in_the_second_row)
        assert run(*words) == 130 and not (tmp_path / "a.nii.gz").exists()
    rows = list(tmp_path.glob(".a.nii.gz.rows/*/row*.npz"))
    assert len(rows) == 1
    count = []
    monkeypatch.setattr(module, "_see_tile", lambda net, volume, box, **settings: count.append(box[0].start) or see(net, volume, box, **settings))
    assert run(*words) == 0 and min(count) > 0 and not (tmp_path / ".a.nii.gz.rows").exists()
    broken = mm.read(tmp_path / "a.nii.gz").array
    assert run(*words, "--overwrite") == 0
    np.testing.assert_array_equal(broken, mm.read(tmp_path / "a.nii.gz").array)


def test_a_ct_that_says_no_unit_is_known_by_its_air_and_other_volumes_are_refused(trained3d, ct, tmp_path, capsys):
    words = ["--weights", trained3d / "weights.safetensors", "--tile", 8]
    mm.write(tmp_path / "plain.nii.gz", ct.with_array(ct.array, unit=""))
    assert run("predict", tmp_path / "plain.nii.gz", "-o", tmp_path / "p.nii.gz", *words) == 0
    assert run("predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "a.nii.gz", *words) == 0
    np.testing.assert_array_equal(mm.read(tmp_path / "p.nii.gz").array, mm.read(tmp_path / "a.nii.gz").array)
    hu = ct.array.copy()
    hu[3, 3, 3] = np.nan
    wrong = {"mr": (np.abs(ct.array), ""), "scaled": (np.clip((ct.array + 1000) / 1400, 0, 1), "HU"), "nan": (hu, "HU")}
    capsys.readouterr()
    for name, (array, unit) in wrong.items():
        mm.write(tmp_path / f"{name}.nii.gz", ct.with_array(array, unit=unit))
        assert run("predict", tmp_path / f"{name}.nii.gz", "-o", tmp_path / "n.nii.gz", *words) == 2
        assert said(capsys).startswith("medmatting: ct: got") and not (tmp_path / "n.nii.gz").exists()
    mm.write(tmp_path / "colour.png", np.zeros((9, 9, 3), np.uint8))
    assert run("predict", tmp_path / "colour.png", "-o", tmp_path / "n.nii.gz", *words) == 2 and "a volume (D, H, W)" in said(capsys)


def test_volumes_smaller_than_what_3dmm_sees_are_answered(trained3d, tmp_path):
    hu = np.random.default_rng(1).normal(-700, 200, (2, 1, 3)).astype(np.float32)
    mm.write(tmp_path / "ct.nii.gz", mm.Volume(hu, (0.5, 0.5, 0.5), unit="HU"))
    assert run("predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "a.nii.gz", "--weights", trained3d / "weights.safetensors") == 0
    alpha = mm.read(tmp_path / "a.nii.gz").array
    assert alpha.shape == (2, 1, 3) and 0 <= alpha.min() <= alpha.max() <= 1


def test_maps_that_a_network_does_not_make_and_places_that_collide_are_refused(trained3d, weights, ct, picture, tmp_path, capsys):
    volume = ["predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "a.nii.gz", "--weights", trained3d / "weights.safetensors"]
    image = ["predict", tmp_path / "in.png", "-o", tmp_path / "a.png", "--weights", weights / "region-aware.safetensors"]
    for words, message in (([*volume, "--uncertainty", tmp_path / "u.nii.gz"], "--uncertainty: got it with weights of 3dmm"),
                           ([*image, "--union", tmp_path / "u.png"], "--union: got it with weights of region-aware"),
                           ([*volume, "--union", tmp_path / "a.nii.gz"], "another place than --output"),
                           ([*volume, "--union", tmp_path / "u.nii.gz", "--overlap", tmp_path / "u.nii.gz"], "the other maps"),
                           ([*volume, "--tile", 0], "tile, overlap"),
                           ([*volume, "--trimap", tmp_path / "ct.nii.gz"], "leave out --trimap"),
                           ([*volume[:3], tmp_path / "a.png", *volume[4:]], "a volume of 7 slices")):
        assert run(*words) == 2 and message in said(capsys)
    assert not list(tmp_path.glob("[au].*")) and not list(tmp_path.glob(".*"))


def test_damaged_weights_and_weights_of_another_network_are_refused(trained3d, ct, tmp_path, capsys):
    good = (trained3d / "weights.safetensors").read_bytes()
    net, card = load_network(trained3d / "weights.safetensors")
    (tmp_path / "short.safetensors").write_bytes(good[:-100])
    net.config = {**net.config, "widths": [2, 6]}
    save_weights(tmp_path / "other.safetensors", net, card)
    net.kind = "4dmm"
    save_weights(tmp_path / "kind.safetensors", net, card)
    for name, message in (("short", "not a whole weights file"), ("other", "does not fit the network '3dmm'"), ("kind", "a network '4dmm'")):
        assert run("predict", tmp_path / "ct.nii.gz", "-o", tmp_path / "a.nii.gz", "--weights", tmp_path / f"{name}.safetensors") == 2
        assert message in said(capsys) and not (tmp_path / "a.nii.gz").exists()


def test_a_folder_of_cts_goes_on_past_a_bad_one_and_resumes(trained3d, ct, tmp_path, capsys):
    folder, out = tmp_path / "cts", tmp_path / "alphas"
    for name in ("a", "b"):
        mm.write(folder / f"{name}.nii.gz", ct)
    (folder / "b.nii.gz").write_bytes(b"nothing")
    words = ["predict", folder, "-o", out, "--union", tmp_path / "unions", "--weights", trained3d / "weights.safetensors", "--tile", 8]
    assert run(*words) == 1 and "b.nii.gz" in said(capsys)
    assert [p.name for p in out.iterdir()] == [p.name for p in (tmp_path / "unions").iterdir()] == ["a.nii.gz"]
    mm.write(folder / "b.nii.gz", ct)
    assert run(*words) == 0 and "2 images, 1 done before" in capsys.readouterr().out


def test_a_dicom_series_goes_in_and_a_segmentation_comes_out(trained3d, tmp_path, capsys):
    miniature_dicom.series(tmp_path / "series", n=6)
    words = ["predict", tmp_path / "series", "--weights", trained3d / "weights.safetensors"]
    assert run(*words, "-o", tmp_path / "alpha.dcm", "--segment", "lung nodule") == 0
    assert run(*words, "-o", tmp_path / "alpha.nii.gz") == 0
    stored, alpha = mm.read(tmp_path / "alpha.dcm"), mm.read(tmp_path / "alpha.nii.gz")
    np.testing.assert_allclose(stored.array, alpha.array, atol=0.5 / 255 + 1e-6)
    assert np.allclose(stored.origin, alpha.origin, atol=1e-4)
    assert run("predict", tmp_path / "series", "-o", tmp_path / "b.dcm", "--weights", trained3d / "weights.safetensors", "--segment", "cloud") == 2
    assert "segment" in said(capsys) and not (tmp_path / "b.dcm").exists()
