"""A small labelling: soft balls in lung, each with four masks, that solvers finish at once."""

import numpy as np

from medmatting import Volume
from medmatting import labelling as lb

SMALL = lb.LabellingSettings(methods=("cf", "cf+", "lb"), size_px=None, spacing_mm=None, dilate_mm=1.0)


def ball(shape=(11, 20, 20), radius=4.0, centre=None, spacing=(1.0, 1.0, 1.0)):
    "A bool ball."
    grid = np.indices(shape, float)
    centre = np.subtract(shape, 1) / 2 if centre is None else centre
    return sum(((g - c) * s) ** 2 for g, c, s in zip(grid, centre, spacing)) <= radius**2


def nodule(seed=0, hu=30.0, noise=10.0):
    "A soft ball in lung and four masks of it."
    rng = np.random.default_rng(seed)
    shape = (11, 20, 20)
    masks = [ball(shape, radius) for radius in (3.2, 3.6, 4.0, 4.4)]
    alpha = np.clip((5 - np.sqrt(sum((g - c) ** 2 for g, c in zip(np.indices(shape, float), np.subtract(shape, 1) / 2)))) / 2, 0, 1)
    ct = -850 + (hu + 850) * alpha + rng.normal(0, noise, shape)
    return Volume(ct.astype(np.float32), (1.0, 1.0, 1.0), unit="HU"), masks


def write_labelling(folder, cases: int = 2, settings=SMALL):
    "A labelling with its candidates."
    made = lb.open_labelling(folder, settings)
    for i in range(cases):
        lb.add_case(made, f"case-{i}", *nodule(i))
    lb.make_candidates(made, progress=False)
    return made
