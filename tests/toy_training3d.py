"""A tiny 3DMM on soft balls, trained in one process or in several; torchrun and spawned processes import it."""

import sys
from pathlib import Path

import numpy as np
import torch

from medmatting.matting3d import Matting3D
from medmatting.recipes3d import Crops, Objective3D, Prepare3D, make_sample3d, paper_recipe3d
from medmatting.train import make_fabric, train


def samples(count: int = 6, side: int = 12) -> list[dict]:
    "Soft balls in noise, each with four masks."
    axes = np.ogrid[tuple(slice(-(side - 1) / 2, side / 2) for _ in range(3))]
    distance = np.sqrt(sum(axis**2 for axis in axes))
    made = []
    for seed in range(count):
        radius = 2.5 + 0.3 * seed
        alpha = np.clip((radius + 1 - distance) / 2, 0, 1)
        masks = np.stack([distance < radius + d for d in (-1, 0, 0, 1)])
        made.append(make_sample3d(f"ball{seed}", alpha * 900 - 850 + np.random.default_rng(seed).normal(0, 20, alpha.shape), alpha, masks))
    return made


def run(folder, fabric=None) -> Objective3D:
    "Some steps of the recipe; the batch of 4 is that of all processes together."
    torch.manual_seed(0)
    objective = Objective3D(Matting3D(widths=(2, 4), units=1, convs=1))
    train(objective, samples(), paper_recipe3d(6, epochs=4, batch=4, rate=3e-3), folder, Prepare3D(Crops((8, 8, 8))), fabric, save_every=2, progress=False)
    return objective


def shared(fabric, folder, result):
    "The same in each of several processes; the first one writes the weights down."
    objective = run(folder, fabric)
    if fabric.is_global_zero:
        torch.save(objective.state_dict(), result)


if __name__ == "__main__":  # FOLDER RESULT, alone for two spawned processes, or by torchrun
    torch.set_num_threads(1)
    make_fabric("cpu", 2).launch(shared, Path(sys.argv[1]), sys.argv[2])
