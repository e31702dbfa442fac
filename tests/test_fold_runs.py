"""One fold: what decides the run is recorded, and a run is the same however it is made."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from medmatting import fold_runs
from medmatting.augment import Augmentation
from medmatting.checks import InputError
from medmatting.fold_runs import FoldRun, train_fold
from medmatting.train import Recipe, read_weights

RUN = FoldRun("plain-unet", "brain-growth", 3, Recipe(steps=4, batch=2, rate=1e-3), "small", {"widths": [4, 6]},
              augmentation=Augmentation(rotation=20, crop=48))


class Stopped(Exception):
    pass


def stops_at(step):
    "The augmentation of a run that is ended while it makes the batch of a step."
    class Stopping(fold_runs.Prepare):
        calls = 0

        def __call__(self, sample, generator):
            type(self).calls += 1
            if self.calls > step * RUN.recipe.batch:
                raise Stopped
            return super().__call__(sample, generator)
    return Stopping


def test_a_run_is_decided_by_its_record_and_not_by_where_it_was_interrupted(tmp_path, brain_growth_dir, monkeypatch):
    call = dict(data_folder=brain_growth_dir.parent, save_every=2, progress=False)
    first = train_fold(RUN, tmp_path / "whole", **call)
    assert sorted(first.columns) == sorted(["case", "sad", "mse", "grad", "conn", "pixels"]) and len(first) == 9
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(fold_runs, "Prepare", stops_at(step=3))
        train_fold(RUN, tmp_path / "broken", **call)
    assert len(pd.read_csv(tmp_path / "broken" / "history.csv")) == 2 and (tmp_path / "broken" / "curves.png").exists()  # a killed run has them
    second = train_fold(RUN, tmp_path / "broken", **call)
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert len(pd.read_csv(tmp_path / "broken" / "history.csv")) == 4
    weights, again = (read_weights(tmp_path / name / "weights.safetensors")[3] for name in ("whole", "broken"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    assert json.loads((tmp_path / "whole" / "run.json").read_text())["augmentation"]["crop"] == 48
    with pytest.raises(InputError, match="augmentation"):
        train_fold(replace(RUN, augmentation=Augmentation()), tmp_path / "whole", **call)


def test_pictures_are_drawn_at_the_first_checkpoint_then_by_the_clock_and_at_the_last(tmp_path, monkeypatch):
    now, drawn = 0.0, []
    monkeypatch.setattr(fold_runs.time, "monotonic", lambda: now)
    curves = fold_runs.Curves(tmp_path, "", steps=50)
    monkeypatch.setattr(curves, "write", lambda history: drawn.append(len(history)))
    for step, now in zip((10, 20, 30, 40, 50), (5.0, 64.0, 66.0, 70.0, 71.0)):
        curves([{}] * step)
    assert drawn == [10, 30, 50]
