"""What keeps the repository in order: sources that are clean, exported and executable; one home for each fact."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import requirements
from build import NBS, ROOT, executed, notebooks, readme
from packaging.requirements import Requirement
from packaging.version import Version

import medmatting

EXPERIMENTS = sorted((NBS / "experiments").glob("*.ipynb"))
SOURCES = [*notebooks(), *EXPERIMENTS]
MODULES = {m.group(1): path for path in sorted(NBS.glob("[0-9]*.ipynb"))
           if (m := re.search(r'"#\| default_exp (\w+)', path.read_text(encoding="utf-8")))}  # fmt: skip
THESE = ("tests/test_gates.py", "tests/test_site.py")  # they spell out what they forbid
short = lambda path: path.relative_to(NBS).as_posix() if path.is_relative_to(NBS) else str(path)


def tracked() -> list[str]:
    "Files of the repository as git knows them, and those it would take up."
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


# ---- notebooks and what is made from them


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A copy of the sources in which tools may write."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("settings.ini", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("nbs", "medmatting"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("data", "__pycache__", "_website", ".*"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    "Every file of a folder with its bytes."
    files = (path for name in ("nbs", "medmatting") for path in (folder / name).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if "__pycache__" not in path.parts}


@pytest.mark.parametrize("tool", ["nbdev_clean", "nbdev_export"])
def test_cleaning_and_exporting_change_nothing(copy, tool):
    before = contents(copy)
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run([str(Path(sys.executable).parent / tool)], cwd=copy, env={**os.environ, "PATH": paths},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = contents(copy)
    assert sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)) == []


def test_readme_is_the_home_page():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make docs`, which writes README.md"


def test_readme_opens_with_a_picture_and_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    picture, commands = text.index("!["), re.findall(r"^make \w+", text, re.M)
    assert picture < text.index("make reproduce") and commands == ["make reproduce", "make test"]
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_a_source_notebook_holds_no_results(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs belong to executed copies"
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)
    assert re.match(r"# [^\n]+\n+> [^\n]+", nb.cells[0].source), "the first cell is '# Title' and '> one sentence'"


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_a_notebook_imports_by_name_and_writes_elsewhere(path):
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert not re.search(r"^\s*from .+ import \*", code, re.M)
    assert not re.search(r"/root/|/home/\w|/work/|[A-Z]:\\\\", code)


@pytest.mark.parametrize("path", notebooks(), ids=short)
def test_a_notebook_runs_in_a_fresh_kernel(path):
    assert executed(path).exists()


def test_each_experiment_has_one_parameters_cell():
    tagged = {short(path): sum("parameters" in cell.metadata.get("tags", []) for cell in nbformat.read(path, 4).cells)
              for path in SOURCES}  # fmt: skip
    assert {name: count for name, count in tagged.items() if count} == {short(path): 1 for path in EXPERIMENTS}


def test_every_notebook_is_in_the_navigation():
    from smalldocs.config import glob_match

    named = re.findall(r"[\w/*.]+\.ipynb", (ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert [p for p in map(short, notebooks()) if not any(glob_match(p, pattern) for pattern in named)] == []


# ---- the package


def imports_of(path: Path) -> set[str]:
    "Modules of this package that a module imports anywhere in its code."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.split(".")[0] == "medmatting":
                module = module.removeprefix("medmatting").lstrip(".")
                found |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("medmatting.")}
    return found & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_stands_on_lower_floors_only(module):
    floor = lambda name: MODULES[name].name.split("_")[0]  # "18a" lies between "18" and "19"
    path = ROOT / "medmatting" / f"{module}.py"
    assert sorted(name for name in imports_of(path) if floor(name) >= floor(module)) == []


def test_importing_is_light():
    heavy = "torch numba matplotlib pymatting SimpleITK pydicom pandas".split()
    code = f"import sys, medmatting; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_those_of_the_list():
    listed = (ROOT / "tests" / "public_names.txt").read_text(encoding="utf-8").split()
    assert sorted(medmatting.__all__) == listed
    assert all(getattr(medmatting, name) is getattr(medmatting, name) for name in listed)
    # A submodule, once imported, would hide a name spelt like it.
    assert set(listed) & {path.stem for path in (ROOT / "medmatting").glob("*.py")} == set()


@pytest.mark.parametrize("module", MODULES)
def test_functions_stay_short(module):
    tree = ast.parse((ROOT / "medmatting" / f"{module}.py").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert {f.name: n for f in functions if (n := f.end_lineno - f.body[0].lineno + 1) > 50} == {}


# ---- requirements


def test_environment_yml_follows_settings():
    assert (ROOT / "environment.yml").read_text(encoding="utf-8") == requirements.environment_yml(), "run `make lock`"


def test_the_lock_meets_settings():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.M):
        pins.setdefault(name.lower().replace("_", "-"), []).append(version)
    for wanted in map(Requirement, sum(requirements.groups().values(), [])):
        found = pins.get(wanted.name.lower().replace("_", "-"), [])
        assert found and all(wanted.specifier.contains(Version(v)) for v in found), f"{wanted}: {found}; run `make lock`"


def test_the_lock_has_hashes_and_no_addresses():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pinned = re.findall(r"^[\w.-]+==.*?(?=^[\w.-]+==|\Z)", lock, re.M | re.S)
    assert pinned and all("--hash=sha256:" in pin for pin in pinned)
    assert not re.search(r"https?://|index-url|find-links", lock)


def test_version_and_name_have_one_home():
    assert medmatting.__version__ == requirements.settings()["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.M).group(1) == medmatting.__version__


# ---- the repository


def test_nothing_points_at_one_machine():
    text = lambda name: (ROOT / name).read_text(encoding="utf-8", errors="ignore")
    kinds = (".py", ".ipynb", ".md", ".yml", ".yaml", ".ini", ".toml", ".csv", ".cff", ".bib", ".css", ".json", ".qmd", "")
    names = [n for n in tracked() if Path(n).suffix in kinds and "katex" not in n and n not in THESE]
    forbidden = re.compile(r"/root/|/work/(main|shared|src|tools)|pypi\.org|pythonhosted|registry\.npmjs|/tmp/bash")
    assert {name: found for name in names if (found := forbidden.findall(text(name)))} == {}


def test_data_that_may_not_be_shipped_are_not_here():
    banned = re.compile(r"brain_growth_alpha|trimap_brain|\.(pkl|pickle|dcm|zip|tar|gz)$")
    assert [name for name in tracked() if banned.search(name)] == []
    sizes = {name: (ROOT / name).stat().st_size for name in tracked()}
    assert max(sizes.values()) < 3_200_000 and sum(sizes.values()) < 40_000_000


def test_make_reproduce_and_test_are_targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("reproduce", "test", "docs", "lab", "bench", "lock"):
        assert re.search(rf"^{target}: \$\(READY\)$", text, re.M), target
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_references_are_well_formed():
    entries = re.findall(r"^@(\w+)\{(\w+),(.*?)^\}", (ROOT / "paper.bib").read_text(encoding="utf-8"), re.M | re.S)
    keys = [key for _, key, _ in entries]
    assert len(keys) == len(set(keys)) >= 12
    assert all(all(f"  {field} = {{" in body for field in ("title", "author", "year")) for _, _, body in entries)
    assert json.dumps(keys).count("2022") >= 1
