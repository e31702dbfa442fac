"""The reproduction machinery, on tiny notebooks in a temporary repository."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medmatting import run
from medmatting.checks import InputError
from medmatting.manifest import MANIFEST, read_manifest

REPOSITORY = Path(__file__).parents[1]
GOOD = 'from pathlib import Path\nPath(out_dir, "table.csv").write_text(f"value\\n{value}\\n")'


def notebook(*sources, parameters='out_dir = ""\nvalue = 1', ids="c"):
    def cell(number, source):
        tags = {"tags": ["parameters"]} if number == 0 else {}
        return dict(cell_type="code", id=f"{ids}{number}", metadata=tags, source=source, outputs=[], execution_count=None)
    cells = [cell(*pair) for pair in enumerate([parameters, *sources])]
    return dict(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
                nbformat=4, nbformat_minor=5)


def entry(name, **changes):
    return dict(id=name, title=name, paper="none", item="-", notebook=f"nbs/experiments/{name}.ipynb",
                parameters={"quick": {}, "full": {"value": 2}}, inputs=[], optional_data=[],
                outputs={"table.csv": {"caption": "A value"}},
                resources={"minutes": {"quick": 1, "full": 1}, "memory_gb": 1, "gpu": False}, claims=[]) | changes


def repository(folder, notebooks, **changes):
    "A repository with one item for each notebook."
    place = folder / "nbs/experiments"
    place.mkdir(parents=True, exist_ok=True)
    for name, content in notebooks.items():
        (place / f"{name}.ipynb").write_text(json.dumps(content))
    items = [entry(name, **changes.get(name, {})) for name in notebooks]
    (folder / MANIFEST).write_text(json.dumps({"items": items}))  # JSON is YAML
    shutil.copy(REPOSITORY / "Snakefile", folder)
    return folder


def item_of(root, name="good"):
    return read_manifest(root)[name]


# Reading the manifest

@pytest.mark.parametrize("change, words", [
    ({"parameters": {"quick": {"vlaue": 3}, "full": {}}}, "'vlaue'"),
    ({"parameters": {"quick": {}}}, "parameters"),
    ({"parameters": {"quick": {}, "full": {}, "slow": {}}}, "parameters"),
    ({"parameters": {"quick": {}, "full": {}, "reduced": {}}}, "'reduced'"),
    ({"captions": []}, "unknown key 'captions'"),
    ({"notebook": "nbs/experiments/absent.ipynb"}, "absent.ipynb, which is missing"),
    ({"notebook": "../elsewhere.ipynb"}, "notebook"),
    ({"inputs": ["lidc_nodule"]}, "'lidc_nodule'"),
    ({"optional_data": ["brain_growth"]}, "optional_data"),
    ({"outputs": {"../table.csv": {"caption": "x"}}}, "outputs"),
    ({"outputs": {"figure.png": {"caption": "x"}}}, "alt"),
    ({"resources": {"minutes": {"quick": 0, "full": 1}, "memory_gb": 1, "gpu": False}}, "resources"),
    ({"id": "Good"}, "id"),
])
def test_a_wrong_entry_is_refused(tmp_path, change, words):
    repository(tmp_path, {"good": notebook(GOOD)}, good=change)
    with pytest.raises(InputError, match="manifest item") as told:
        read_manifest(tmp_path)
    assert words in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("content, words", [
    ("items: [", "not YAML"), ("items: {}", "one key 'items'"), ("[]", "one key 'items'"), ("items: [3]", "mapping"),
])
def test_a_broken_manifest_is_refused(tmp_path, content, words):
    repository(tmp_path, {"good": notebook(GOOD)})
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=words):
        read_manifest(tmp_path)


def test_ids_are_unique(tmp_path):
    repository(tmp_path, {"good": notebook(GOOD)})
    (tmp_path / MANIFEST).write_text(json.dumps({"items": [entry("good"), entry("good")]}))
    with pytest.raises(InputError, match="two items"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content, words", [
    (notebook(GOOD, parameters='out_dir = ""\nvalue = len("a")'), "name = literal"),
    (notebook(GOOD, parameters="value = 1"), "'out_dir'"),
    (notebook(GOOD) | {"cells": notebook(GOOD)["cells"][1:]}, "0 cells tagged"),
    (notebook(GOOD) | {"cells": 2 * notebook(GOOD)["cells"]}, "2 cells tagged"),
    ({"cells": 3}, "no notebook"),
])
def test_a_wrong_parameters_cell_is_refused(tmp_path, content, words):
    repository(tmp_path, {"good": content})
    with pytest.raises(InputError, match=words):
        read_manifest(tmp_path)


def test_outside_a_checkout_it_is_said(tmp_path):
    with pytest.raises(InputError, match="checkout"):
        run.reproduce(root=tmp_path)


def test_unknown_items_and_profiles_are_refused(tmp_path):
    repository(tmp_path, {"good": notebook(GOOD)})
    with pytest.raises(InputError, match="'bad'"):
        run.reproduce(["bad"], root=tmp_path)
    with pytest.raises(InputError, match="quick or full"):
        run.reproduce(profile="fast", root=tmp_path)


# Fingerprints

def mark(root, name="good", profile="quick"):
    return run.fingerprint(run.made_from(item_of(root, name), profile, root))


def test_the_fingerprint_follows_content_only(tmp_path, monkeypatch):
    first = mark(repository(tmp_path, {"good": notebook(GOOD)}))
    executed = notebook(GOOD, ids="other")
    executed["cells"][1]["outputs"] = [dict(output_type="stream", name="stdout", text="x")]
    assert mark(repository(tmp_path, {"good": executed})) == first
    os.utime(tmp_path / "nbs/experiments/good.ipynb", (0, 0))
    assert mark(tmp_path) == first

    others = [mark(tmp_path, profile="full"),
              mark(repository(tmp_path, {"good": notebook(GOOD + " ")})),
              mark(repository(tmp_path, {"good": notebook(GOOD, parameters='out_dir = ""\nvalue = 5')})),
              mark(repository(tmp_path, {"good": notebook(GOOD)}, good={"inputs": ["lidc_nodules"]}))]
    repository(tmp_path, {"good": notebook(GOOD)})
    monkeypatch.setattr(run, "package_hash", lambda: "changed")
    others.append(mark(tmp_path))
    assert first not in others and len(set(others)) == len(others)


def test_what_an_experiment_collects_is_part_of_its_fingerprint(tmp_path):
    source = "figures/quick/other/table.csv"
    root = repository(tmp_path, {"good": notebook(GOOD, parameters=f'out_dir = ""\nvalue = "{source}"')}, good={"parameters": {"quick": {}, "full": {"value": 2}}})
    marks, file = [mark(root)], root / source
    file.parent.mkdir(parents=True)
    for text in ("a", "b"):
        file.write_text(text)
        marks.append(mark(root))
    assert len(set(marks)) == 3
    old, new = ({"published": {source: text}} for text in ("1", "2"))
    assert run.why(old, new) == f"changed: published ({source})"
    assert "published" not in run.made_from(item_of(root), "full", root)


def test_the_reason_names_what_changed(tmp_path):
    root = repository(tmp_path, {"good": notebook(GOOD)})
    old, new = (run.made_from(item_of(root), profile, root) for profile in ("quick", "full"))
    assert run.why(old, new) == "changed: parameters (value)"
    new = old | {"versions": old["versions"] | {"numpy": "9"}, "notebook": "0", "data": {"lidc_nodules": {}}}
    assert all(words in run.why(old, new) for words in ("numpy", "-> 9", "the notebook", "data (lidc_nodules)"))


# Running

def published(root, name="good", profile="quick"):
    return root / "figures" / profile / name / "table.csv"


def test_a_run_is_recorded_published_and_not_repeated(tmp_path):
    root = repository(tmp_path, {"good": notebook(GOOD + '\nprint("done")')})
    assert [o.status for o in run.reproduce(root=root)] == ["ran"]
    assert published(root).read_text() == "value\n1\n"
    text = run.provenance_path(published(root)).read_text()
    record = json.loads(text)
    assert record["outputs"]["table.csv"] == {"sha256": run.sha256_of(published(root)), "cells": ["c1"]}
    assert record["made_from"]["parameters"] == {"out_dir": ".", "value": 1}
    assert record["rerun"] == "medmatting reproduce good --profile quick" and record["seconds"] > 0
    executed = next((root / "build").glob("quick/good/*/notebook.ipynb")).read_text()
    for secret in (str(tmp_path), str(Path.home()), platform.node(), sys.prefix):
        assert secret not in text and secret not in executed

    before = published(root).stat().st_mtime_ns
    assert [o.status for o in run.reproduce(root=root)] == ["up to date"]
    assert published(root).stat().st_mtime_ns == before


def test_a_profile_that_only_some_items_have(tmp_path):
    third = dict(parameters={"quick": {}, "reduced": {"value": 5}, "full": {"value": 2}},
                 resources={"minutes": {"quick": 1, "reduced": 60, "full": 600}, "memory_gb": 1, "gpu": False})
    root = repository(tmp_path, {"good": notebook(GOOD), "plain": notebook(GOOD)}, good=third)
    ran, skipped = run.reproduce(profile="reduced", root=root)
    assert (ran.status, skipped.status) == ("ran", "skipped") and not run.Outcomes([ran, skipped]).failed
    assert skipped.note == "has no reduced profile; its profiles are quick and full"
    assert published(root, "good", "reduced").read_text() == "value\n5\n" and not published(root, "plain", "reduced").exists()


def test_failures_are_told_and_cost_nothing_old(tmp_path, capfd):
    root = repository(tmp_path, {"good": notebook(GOOD)})
    run.reproduce(root=root)
    kept = {p: p.read_bytes() for p in root.glob("figures/**/*") if p.is_file()}
    breaks = GOOD.replace("{value}", "half")
    silent = notebook("pass")
    root = repository(tmp_path, {"good": notebook(breaks, 'raise ValueError("no such luck")'), "silent": silent,
                                 "other": notebook(GOOD)})
    outcomes = run.reproduce(root=root, jobs=2)
    assert outcomes.failed and {o.item: o.status for o in outcomes} == {"good": "failed", "silent": "failed", "other": "ran"}
    told = capfd.readouterr().out
    assert "cell 3 of 3 failed with ValueError: no such luck" in told and "changed: the notebook" in told
    assert "declared output table.csv is missing or empty" in told and "Traceback" not in told
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert not published(root, "silent").exists() and published(root, "other").exists()
    assert (root / "build/quick/good/failed.ipynb").exists()


def test_data_that_are_not_there_are_no_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMATTING_DATA", str(tmp_path / "nothing"))
    data = dict(inputs=["brain_growth"], optional_data=["brain_growth"])
    root = repository(tmp_path, {"brain": notebook(GOOD), "strict": notebook(GOOD)}, brain=data,
                      strict=data | {"optional_data": []})
    optional, strict = run.reproduce(root=root)
    assert optional.status == "data not present" and "medmatting data fetch brain_growth" in optional.note
    assert strict.status == "failed"
    assert not run.reproduce(["brain"], root=root).failed


def test_a_killed_run_continues(tmp_path):
    "Everything is killed in the middle of the second item; the same command runs only that one again."
    slow = f'import time\nfrom pathlib import Path\nwhile Path({str(tmp_path)!r}, "slow").exists():\n    time.sleep(0.1)'
    root = repository(tmp_path, {"first": notebook(GOOD), "second": notebook(slow, GOOD)})
    (tmp_path / "slow").touch()
    code = "import sys; from medmatting.run import reproduce; reproduce(root=sys.argv[1], jobs=2)"
    process = subprocess.Popen([sys.executable, "-c", code, str(root)], start_new_session=True, stdout=subprocess.DEVNULL)
    build, latest = root / "build/quick", time.monotonic() + 200
    try:
        while not (list(build.glob("first/*.done")) and (build / "second/.running").exists()):
            assert process.poll() is None and time.monotonic() < latest
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run.last_record(build / "second") is None and not published(root, "second").exists()
    first = run.last_record(build / "first")
    (tmp_path / "slow").unlink()
    assert {o.item: o.status for o in run.reproduce(root=root)} == {"first": "up to date", "second": "ran"}
    assert run.last_record(build / "first") == first and published(root, "second").exists()


def test_an_edit_during_a_run_is_noticed(tmp_path):
    "The record would name a notebook that is not the one that ran, so there is no record."
    edit = "from pathlib import Path\nnotebook = Path('../../../../nbs/experiments/good.ipynb')\n"
    edit += "notebook.write_text(notebook.read_text().replace('harmless', 'changed'))"
    root = repository(tmp_path, {"good": notebook(edit, GOOD, "'harmless'")})
    with pytest.raises(run.RunError, match="the notebook while the notebook ran"):
        run.run_item(item_of(root), root=root)
    assert run.last_record(root / "build/quick/good") is None


def test_two_processes_share_one_run(tmp_path):
    "Both ask for the same item at once: the second waits and takes the first one's result."
    count = f'from pathlib import Path\nwith Path({str(tmp_path)!r}, "count").open("a") as file:\n    file.write("x")'
    root = repository(tmp_path, {"good": notebook(count, GOOD)})
    code = ("import sys; from medmatting.run import read_manifest, run_item\n"
            "run_item(read_manifest(sys.argv[1])['good'], root=sys.argv[1])")
    both = [subprocess.Popen([sys.executable, "-c", code, str(root)]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "count").read_text() == "x"


def test_publishing_removes_what_is_no_longer_declared(tmp_path):
    root = repository(tmp_path, {"good": notebook(GOOD)})
    run.reproduce(root=root)
    (published(root).parent / "notes.txt").write_text("somebody's own")
    renamed = notebook(GOOD.replace("table.csv", "values.csv"))
    repository(root, {"good": renamed}, good={"outputs": {"values.csv": {"caption": "A value"}}})
    run.reproduce(root=root)
    assert sorted(p.name for p in published(root).parent.iterdir()) == [
        "notes.txt", "values.csv", "values.csv.provenance.json"]


def test_the_printed_tables_that_a_notebook_names_decide_its_result(tmp_path):
    cell = dict(id="a", cell_type="code", metadata={}, source='pd.read_csv("table1.csv")')
    notebook, printed = tmp_path / "a.ipynb", tmp_path / "printed"
    notebook.write_text(json.dumps(dict(cells=[cell])))
    printed.mkdir()
    for name in ("table1.csv", "table2.csv"):
        (printed / name).write_text("1")
    before = run.printed_hashes(notebook)
    (printed / "table2.csv").write_text("2")
    assert run.printed_hashes(notebook) == before and list(before) == ["table1.csv"]
    (printed / "table1.csv").write_text("2")
    assert run.printed_hashes(notebook) != before
