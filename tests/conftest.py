"""Where the tests find data that the repository may not contain."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, so that a red suite is red again when it is run again; examples nobody has tried:
#   pytest --hypothesis-profile=explore
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("steady")

BRAIN_GROWTH_FILES = ("brain_growth_alpha.zip", "trimap_brain.zip")


@pytest.fixture(scope="session")
def brain_growth_dir() -> Path:
    "The folder with the two Brain-growth zip files: in $MEDMATTING_DATA, or in shared/data beside the repository."
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    roots = [Path(os.environ["MEDMATTING_DATA"])] if os.environ.get("MEDMATTING_DATA") else []
    for root in [*roots, beside]:
        for folder in (root / "brain_growth", root):
            if all((folder / name).is_file() for name in BRAIN_GROWTH_FILES):
                return folder
    pytest.skip("Brain-growth is not here: run `medmatting data fetch brain_growth`, "
                "or set MEDMATTING_DATA to the folder that holds its two zip files")
