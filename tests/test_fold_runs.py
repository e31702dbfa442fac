"""One fold: what decides the run is recorded, and a run is the same however it is made."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from medmatting.augment import Augmentation
from medmatting.checks import InputError
from medmatting.fold_runs import FoldRun, train_fold
from medmatting.train import Recipe, read_weights

RUN = FoldRun("plain-unet", "brain-growth", 3, Recipe(steps=2, batch=2, rate=1e-3), "small", {"widths": [4, 6]})


def trained(run, folder, data):
    scores = train_fold(run, folder, data_folder=data, progress=False)
    return scores, read_weights(folder / "weights.safetensors")[3]


def test_a_run_is_decided_by_its_record(tmp_path, brain_growth_dir):
    cropped = replace(RUN, augmentation=Augmentation(rotation=20, crop=48))
    first, weights = trained(cropped, tmp_path / "a", brain_growth_dir.parent)
    second, again = trained(cropped, tmp_path / "b", brain_growth_dir.parent)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert sorted(first.columns) == sorted(["case", "sad", "mse", "grad", "conn", "pixels"]) and len(first) == 9
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["augmentation"]["crop"] == 48
    with pytest.raises(InputError, match="augmentation"):
        train_fold(RUN, tmp_path / "a", data_folder=brain_growth_dir.parent)
