"""Soft segmentation (alpha matting) of medical images in 2D and 3D."""

__version__ = "0.1.0"

from importlib import import_module

# Public names and the module each lives in. They are imported on first use, so that
# `import medmatting` stays fast: nothing is compiled and torch is not loaded.
_HOME = {
    "DataError": "registry",
    "nodule": "lidc",
    "composite": "photographs",
    "score": "metrics",
    "matte": "matting",
    "MatteInfo": "matting",
    "InputError": "checks",
    "WriteError": "checks",
    "ConvergenceError": "linear",
    "Volume": "volumes",
    "read_dicom": "dicom",
    "write": "files",
    "read": "files",
    "show": "plots",
    "paste": "volumes",
    "crop_nodule": "volumes",
    "crop": "volumes",
    "resample_like": "volumes",
    "resample": "volumes",
    "check_trimap": "trimaps",
    "clean_trimap": "trimaps",
    "trimap_from_file": "trimaps",
    "trimap_from_mask": "trimaps",
    "trimap_from_raters": "trimaps",
    "Window": "hounsfield",
    "LUNG": "hounsfield",
    "MEDIASTINUM": "hounsfield",
    "calibrate": "hounsfield",
    "solving_range": "hounsfield",
    "sad": "metrics",
    "mse": "metrics",
    "load_fba": "fba",
    "load_shipped": "predict",
    "predict_fba": "fba",
    "load_matteformer": "matteformer",
    "predict_matteformer": "matteformer",
    "grad": "metrics",
    "conn": "metrics",
    "ImplicitUpsample": "implicit",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'medmatting' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *__all__})
