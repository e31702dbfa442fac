"""A labelled set of small volumes: soft balls in noise, as `export_set` writes it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from medmatting.files import write
from medmatting.registry import sha256_of
from medmatting.trimaps import trimap_from_raters
from medmatting.volumes import Volume

PATIENTS, SIDE = 15, 16


def ball(seed: int, side: int = SIDE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "HU, alpha and masks."
    random, axes = np.random.default_rng(seed), np.ogrid[tuple(slice(-(side - 1) / 2, side / 2) for _ in range(3))]
    distance = np.sqrt(sum(axis**2 for axis in axes))
    radius = random.uniform(3, 5)
    alpha = np.clip((radius + 1 - distance) / 2, 0, 1).astype(np.float32)
    masks = np.stack([distance < radius + d for d in (-1, 0, 0, 1)])
    return (alpha * 900 - 850 + random.normal(0, 20, alpha.shape)).astype(np.float32), alpha, masks


def write_volumes(folder: Path, patients: int = PATIENTS, spacing: float = 0.5, unit: str = "HU") -> Path:
    "The set; patient 0 has two nodules."
    rows = []
    for number in range(patients + 1):
        case = f"P{max(number - 1, 0):02d}_12345{min(number, 1)}_nodule{2 if number == 1 else 1}"
        hu, alpha, masks = ball(number)
        place = Volume(hu, (spacing,) * 3, unit=unit)
        parts = {"image": place, "alpha": place.with_array(alpha, unit=""), "trimap": place.with_array(trimap_from_raters(masks, 0.5, spacing=0.5, vanishing="keep"), unit="")}
        parts |= {f"rater{i}": place.with_array(mask.astype(np.uint8), unit="") for i, mask in enumerate(masks, 1)}
        for name, volume in parts.items():
            write(folder / case / f"{name}.nii.gz", volume)
        rows.append(dict(case=case, accepted=True, method="cf+", raters=4, alpha_sha256=sha256_of(folder / case / "alpha.nii.gz")))
    rows.append(dict(case="left_out", accepted=False, method="", raters="", alpha_sha256=""))
    pd.DataFrame(rows).to_csv(folder / "cases.csv", index=False)
    (folder / "dataset.json").write_text(json.dumps({}))
    return folder
