"""Labelling a folder of cases from the command line and by Snakemake: failures are listed, the rest goes on, nothing is done twice."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medmatting import labelling as lb
from medmatting.checks import WriteError
from medmatting.cli import main
from medmatting.files import write
from miniature_labelling import SMALL, nodule

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["--setting", "methods", '["cf", "cf+"]', "--setting", "size_px", "null", "--setting", "spacing_mm", "null"]


def put_case(folder, seed=0, raters=4):
    "A case as files."
    folder.mkdir(parents=True)
    image, masks = nodule(seed)
    write(folder / "image.nii.gz", image)
    for k, mask in enumerate(masks[:raters]):
        write(folder / f"rater{k}.nii.gz", mask.astype(np.uint8), like=image)


@pytest.fixture
def cases(tmp_path):
    "Two good cases and one that three readers outlined."
    for seed, (name, raters) in enumerate({"a": 4, "b": 3, "c": 4}.items()):
        put_case(tmp_path / "cases" / name, seed, raters)
    return tmp_path / "cases"


def label(cases, *words):
    return main(["label", str(cases), "-o", str(cases.parent / "labelling"), *words])


def test_what_fails_is_listed_and_the_rest_is_done_once(cases, capsys):
    assert label(cases, *SETTINGS) == 1
    said = capsys.readouterr()
    assert "3 cases, candidates: 4 computed, 0 kept, 1 failed" in said.out
    assert "medmatting: b: b: got masks of 3 rater(s)" in said.err and "Traceback" not in said.err
    image, masks = nodule(1)
    write(cases / "b" / "rater3.nii.gz", masks[3].astype(np.uint8), like=image)
    assert label(cases) == 0 and "2 computed, 4 kept, 0 failed" in capsys.readouterr().out
    assert lb.open_labelling(cases.parent / "labelling").settings.methods == ("cf", "cf+")


def test_one_job_of_a_batch_does_its_own_case_only(cases, capsys):
    assert label(cases, *SETTINGS, "--case", "c") == 0 and "1 cases, candidates: 2 computed" in capsys.readouterr().out
    assert label(cases, "--case", "a") == 0 and "1 cases, candidates: 2 computed, 0 kept" in capsys.readouterr().out
    assert lb.open_labelling(cases.parent / "labelling").cases() == ("a", "c")


@pytest.mark.parametrize("words, told", [
    (["--case", "d"], "--case: got d"), (["--setting", "colour", "1"], "--setting: got colour"), (["--setting", "methods", "cf"], "--setting: got methods cf"),
    (["--setting", "methods", '["cg"]'], "methods"), (["-j", "0"], "workers")])  # fmt: skip
def test_refusals_name_the_option(cases, capsys, words, told):
    assert label(cases, *words) == 2
    assert told in capsys.readouterr().err


def test_a_full_disk_costs_what_could_not_be_written_and_is_made_good(tmp_path, monkeypatch):
    made = lb.open_labelling(tmp_path, SMALL)
    for i in range(2):
        lb.add_case(made, f"case-{i}", *nodule(i))
    keep = lb._write_record

    def full(path, record):
        if path.parent.name == "case-0" and path.name in ("cf+.json", "lb.json"):
            raise WriteError(f"{path}: could not be written (No space left on device); free some space")
        keep(path, record)

    monkeypatch.setattr(lb, "_write_record", full)
    table = lb.make_candidates(made, progress=False)
    assert table.status.tolist() == ["computed", "failed", "failed", "computed", "computed", "computed"]
    assert table[table.status == "failed"].reason.str.contains("No space left").all()
    assert list(lb.read_case(made, "case-0").candidates) == ["cf"]
    monkeypatch.undo()
    assert lb.make_candidates(made, progress=False).status.tolist() == ["kept", "computed", "computed", "kept", "kept", "kept"]


# ---- Snakemake


def snakemake(cases, *words):
    "Run the rules of labelling.smk as a user does; the ended process."
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "labelling.smk"), "--directory", str(cases.parent / "work"), "--keep-going", "--cores", "2",
               *words, "--config", f"cases={cases}", f"output={cases.parent / 'labelling'}"]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600)


def done(cases):
    return sorted(path.name for path in (cases.parent / "labelling" / "done").glob("*"))


def test_a_batch_is_spread_continued_and_repaired(cases):
    planned = snakemake(cases, "--dry-run", "--printshellcmds")
    assert planned.returncode == 0, planned.stderr
    told = planned.stdout + planned.stderr
    assert all(f"--case {name}" in told for name in "abc") and "mem_mb=4096" in told and "runtime=60" in told and not (cases.parent / "labelling").exists()
    lb.open_labelling(cases.parent / "labelling", lb.LabellingSettings(methods=("cf", "cf+"), size_px=None, spacing_mm=None))
    first = snakemake(cases)
    assert first.returncode != 0 and done(cases) == ["a", "c"] and "got masks of 3 rater(s)" in first.stderr
    kept = {name: (cases.parent / "labelling" / "cases" / name / "cf.nii.gz").stat().st_mtime_ns for name in "ac"}
    image, masks = nodule(1)
    write(cases / "b" / "rater3.nii.gz", masks[3].astype(np.uint8), like=image)
    second = snakemake(cases)
    assert second.returncode == 0 and done(cases) == ["a", "b", "c"], second.stderr
    assert kept == {name: (cases.parent / "labelling" / "cases" / name / "cf.nii.gz").stat().st_mtime_ns for name in "ac"}
    assert "Nothing to be done" in (again := snakemake(cases)).stdout + again.stderr
