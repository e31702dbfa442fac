"""Files in the form of the published pickles, made of noise and squares."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

PATIENTS, SLICES = 4, 2


def case(name: str, shape=(16, 16), colour: bool = False) -> dict:
    "One case as in the pickle: bright square on noise, three raters who disagree."
    rng = np.random.default_rng(sum(map(ord, name)))
    masks = [np.zeros(shape, np.uint8) for _ in range(3)]
    for grow, mask in enumerate(masks):
        mask[5 - grow:10 + grow, 5 - grow:10 + grow] = 1
    alpha = (np.mean(masks, 0) * 255).astype(np.uint8)
    image = (rng.integers(0, 60, shape) + 0.7 * alpha).astype(np.uint8)
    return dict(series_uid=name, image=np.stack([image] * 3, -1) if colour else image, masks=masks, alpha=alpha)


def lidc_cases() -> dict[str, dict]:
    "Two slices of each of four patients."
    names = [f"{patient}_slice{i}" for patient in range(PATIENTS) for i in range(SLICES)]
    return {name: case(name) for name in names}


def trimap(fields: dict) -> np.ndarray:
    "128 where raters disagree, and one resampling grey."
    made = np.where(fields["alpha"] == 255, 255, np.where(fields["alpha"] > 0, 128, 0)).astype(np.uint8)
    made[tuple(np.argwhere(made == 128)[0])] = 127
    return made


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def write_set(folder: Path, name: str, cases: dict, trimaps: dict | None = None) -> Path:
    "The two zip files of a set; `name` is lidc or isic."
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}_attributes.zip", "w") as archive:
        archive.writestr(f"{name}_attributes.pickle", pickle.dumps(cases, protocol=4))
    with zipfile.ZipFile(folder / f"trimap_{name.upper()}.zip", "w") as archive:
        for key, array in (trimaps or {key: trimap(fields) for key, fields in cases.items()}).items():
            archive.writestr(f"trimap/{key}.png", png(array))
    return folder
