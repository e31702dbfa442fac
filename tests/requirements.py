"""settings.ini is the one home of the requirements; environment.yml and requirements.lock follow from it.

Run as a script (`make lock`) to write both again; tests/test_gates.py checks that they agree.
"""

import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {"": "to use it", "paper": "to reproduce the papers", "view": "to look at volumes in Jupyter", "dev": "to work on it"}

# What the conda-forge channel has under the same (lower-case) name; the rest of the set comes through pip.
CONDA_FORGE = set(
    """numpy scipy numba pandas matplotlib scikit-image simpleitk pydicom pillow ipywidgets papermill ipykernel
    jupyterlab pymatting threadpoolctl tqdm pyyaml pytest hypothesis nibabel setuptools wheel""".split()
)


def settings():
    "The one section of settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def groups() -> dict[str, list[str]]:
    "Requirements of each group, as written in settings.ini."
    return {group: settings()[f"{group}_requirements".lstrip("_")].split() for group in GROUPS}


def name_of(requirement: str) -> str:
    "Distribution name of a requirement, lower case: 'SimpleITK>=2.4' -> 'simpleitk'."
    return requirement.replace("<", " ").replace(">", " ").replace("=", " ").replace("!", " ").split()[0].lower()


def environment_yml() -> str:
    "The text of environment.yml: what conda-forge has, then the rest through pip."
    conda, pip = [], []
    for group, requirements in groups().items():
        for requirement in requirements:
            known = name_of(requirement) in CONDA_FORGE
            (conda if known else pip).append((GROUPS[group], requirement.lower() if known else requirement))
    lines = [
        "# Written by `make lock` from settings.ini; change it there.",
        f"name: {settings()['lib_name']}",
        "channels:",
        "  - conda-forge",
        "dependencies:",
        f"  - python>={settings()['min_python']},<3.14",
        "  - pip",
        *(f"  - {requirement}  # {purpose}" for purpose, requirement in conda),
        "  - pip:",
        *(f"      - {requirement}  # {purpose}" for purpose, requirement in pip),
        "      - --editable .",
    ]
    return "\n".join(lines) + "\n"


def compile_lock(target: Path):
    "Resolve every group for all supported Pythons and platforms into `target`, with hashes and no addresses."
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", f"{folder}/uv"], check=True)
        subprocess.run([f"{folder}/uv/bin/python", "-m", "pip", "install", "--quiet", "uv"], check=True)
        wanted = Path(folder) / "requirements.in"
        wanted.write_text("\n".join(r for group in groups().values() for r in group) + "\n", encoding="utf-8")
        options = "--universal --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet".split()
        subprocess.run([f"{folder}/uv/bin/uv", "pip", "compile", *options, "--python-version", settings()["min_python"],
                        str(wanted), "-o", str(target)], check=True)  # fmt: skip


if __name__ == "__main__":
    (ROOT / "environment.yml").write_text(environment_yml(), encoding="utf-8")
    compile_lock(ROOT / "requirements.lock")
