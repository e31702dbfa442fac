"""The experiment on the LIDC and ISIC columns takes the published files where they are, and then informs their claims."""

import json
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

import miniature
from medmatting.claims import read_claims

NOTEBOOK = Path(__file__).parents[1] / "nbs/experiments/table1_standins.ipynb"


def run(folder, **parameters) -> dict:
    "Run the cells of the notebook with other parameters; its variables."
    space = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", []):
                space.update(parameters, out_dir=str(folder))
    return space


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    matplotlib.use("Agg")
    folder = tmp_path_factory.mktemp("data")
    miniature.write_set(folder / "lidc", "lidc", miniature.lidc_cases())
    miniature.write_set(folder, "isic", {f"ISIC_{i:07d}": miniature.case(f"ISIC_{i:07d}", (18, 18), colour=True) for i in range(8)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMATTING_DATA", str(folder))
        patch.delenv("MEDMATTING_RUNS", raising=False)
        out = tmp_path_factory.mktemp("out")
        return run(out, profile="full", solvers=["cf"], kinds=["plain-unet"], folds=4, steps=1, batch=1), out


def test_published_files_take_the_place_of_the_stand_ins(published):
    space, out = published
    assert list(space["data"]) == ["lidc", "isic"]
    scores = pd.read_csv(out / "cases.csv")
    assert set(scores.case[scores.data == "lidc"]) == set(miniature.lidc_cases()) and scores.notna().all().all()
    text = (out / "standins.md").read_text()
    assert "simulated" not in text and "stand-in" not in text


def test_only_published_rows_carry_the_names_of_claims(published):
    measures = pd.read_csv(published[1] / "measures.csv")
    claims = {claim.id: claim for claim in read_claims(NOTEBOOK.parents[2])}
    found = measures[measures.measure.isin(claims)]
    assert set(found.measure) == {f"ra.t1.{name}.closed_form.{m}" for name in ("lidc", "isic") for m in ("sad", "mse", "grad")}
    assert all(claims[row.measure].data == row.data and claims[row.measure].protocol == row.protocol for row in found.itertuples())


def test_a_solver_without_foreground_is_counted_as_zero(published):
    space, _ = published
    sample = dict(next(iter(space["data"]["lidc"].samples.values())))
    sample["trimap"] = sample["trimap"].clamp(max=128)
    assert (space["solved"]("cf")(sample) == 0).all()
