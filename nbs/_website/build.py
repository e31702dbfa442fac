"""Build the website: `make docs`, or `python nbs/_website/build.py`.

1. Every notebook is executed in a fresh kernel into build/notebooks/, two at a time. Results are kept under a hash of
   the notebook and of everything it may use, so that a second call executes only what changed. Sources stay clean.
2. Pages are prepared in _proc/: executed notebooks without their directives, results and claims, the reference.
3. Quarto renders _proc/ into _docs/ where it is installed, smalldocs otherwise. Nothing is ever installed from here.
4. What a theme would load from elsewhere is replaced by files of the site.
"""

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NBS, CACHE, STAGE, SITE = ROOT / "nbs", ROOT / "build" / "notebooks", ROOT / "_proc", ROOT / "_docs"

def notebooks() -> list[Path]:
    "The notebooks that become pages as they are: home, modules, tutorials. Experiments are run by `reproduce`."
    return [*sorted(NBS.glob("*.ipynb")), *sorted((NBS / "tutorials").glob("*.ipynb"))]


def fingerprint(notebook: Path) -> str:
    "Hash of a notebook and of all it may use: the package with its data, the lock, the claims, the benchmark."
    uses = [*sorted((ROOT / "medmatting").rglob("*.py")), *sorted((ROOT / "medmatting" / "data").rglob("SHA256SUMS"))]
    uses += [ROOT / "requirements.lock", HERE / "tell_pictures.py"]
    uses += [ROOT / "claims.csv"] if notebook.stem == "index" else []
    uses += sorted((ROOT / "figures" / "bench").glob("*")) if notebook.stem == "55_bench" else []
    digest = hashlib.sha256(notebook.read_bytes())
    for path in uses:
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


def executed(notebook: Path) -> Path:
    "The notebook with its outputs, executed now unless nothing has changed since."
    name = notebook.relative_to(NBS).with_suffix("").as_posix().replace("/", "--")
    result = CACHE / f"{name}.{fingerprint(notebook)}.ipynb"
    if result.exists():
        return result
    started = time.monotonic()
    nb = nbformat.read(notebook, as_version=4)
    run_cells(nb, notebook)
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = result.with_suffix(f".{os.getpid()}")
    nbformat.write(nb, temporary)
    for older in CACHE.glob(f"{name}.????????????????.ipynb"):
        older.unlink()
    temporary.rename(result)
    print(f"executed {notebook.relative_to(ROOT)} ({time.monotonic() - started:.0f} s)", flush=True)
    return result


def run_cells(nb, notebook: Path):
    "Execute all cells in a fresh kernel that talks through files: ports may collide when several start at once."
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        files = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/k"}})
        place = {"metadata": {"path": str(notebook.parent)}}
        client = NotebookClient(nb, config=files, kernel_name="python3", timeout=600, resources=place,
                                extra_arguments=[f"--IPKernelApp.exec_files={HERE / 'tell_pictures.py'}"])  # fmt: skip
        with client.setup_kernel():
            for index, cell in enumerate(nb.cells):
                try:
                    client.execute_cell(cell, index)
                except CellExecutionError as error:
                    raise RuntimeError(f"{notebook.relative_to(ROOT)}, cell {index}: {error}") from None


# ---- pages


def page_of(notebook: Path, result: Path) -> nbformat.NotebookNode:
    "An executed notebook as a page: title and summary as front matter, no directives, pictures with their text."
    nb = nbformat.read(result, as_version=4)
    front, rest = front_matter(nb.cells[0].source)
    module = next((m.group(1) for c in nb.cells if (m := re.search(r"^#\|\s*default_exp\s+(\w+)", c.source, re.M))), None)
    if module:
        rest = f"::: {{.module-line}}\nNotebook of `medmatting.{module}` ([reference](/api/{module}.qmd)).\n:::\n\n{rest}"
    cells = [shown(cell, notebook) for cell in [nbformat.v4.new_markdown_cell(rest), *nb.cells[1:]]]
    nb.cells = [nbformat.v4.new_raw_cell(front), *(cell for cell in cells if cell is not None)]
    return nb


def front_matter(text: str) -> tuple[str, str]:
    "Split '# Title', '> summary' and the rest of the first cell."
    title, summary, rest = re.fullmatch(r"#\s+(.+?)\n+((?:>[^\n]*\n?)*)(.*)", text.strip(), re.S).groups()
    summary = " ".join(line.lstrip("> ") for line in summary.splitlines()).strip()
    return f"---\ntitle: {json.dumps(title)}\ndescription: {json.dumps(summary)}\n---", rest.strip()


OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#]+)\)")  # a link to a file beside the notebooks' folder, as ../LICENSE


def outside(text: str, notebook: Path, spell) -> str:
    "Spell links that leave nbs/ anew: `spell` gets the path from the repository's root."

    def found(match):
        path = (notebook.parent / match.group(1)).resolve()
        return match.group(0) if path.is_relative_to(NBS) else f"]({spell(path.relative_to(ROOT))})"

    return OUTSIDE.sub(found, text)


def onto_the_site(path: Path) -> str:
    "Copy a file of the repository beside the pages and name it from the site's root."
    if (ROOT / path).is_file():
        (STAGE / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, STAGE / path)
    return f"/{path.as_posix()}"


def shown(cell, notebook: Path):
    "A cell as readers see it, or None."
    if cell.cell_type != "code":
        cell.source = outside(cell.source, notebook, onto_the_site)
        return cell
    directives = re.findall(r"^#\|\s*(.+)$", cell.source, re.M)
    cell.source = re.sub(r"^#\|\s*(?!fig-|tbl-|echo|output|include)\S.*\n?", "", cell.source, flags=re.M).strip()
    if not cell.source or "hide" in directives:
        return None
    cell.outputs = [output for output in (told(output, notebook) for output in cell.outputs) if output is not None]
    if all(re.match(r"import |from |    |\)|$", line) for line in cell.source.splitlines()):
        cell.source = f"#| code-fold: true\n#| code-summary: Imports\n{cell.source}"
    return cell


def told(output, notebook: Path):
    "An output with alt text on its picture, without progress bars, its links spelled for the site."
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r", "", output.text)
        return output if output.text.strip() else None
    if text := output.get("data", {}).get("text/markdown"):
        output.data = {"text/markdown": outside(text, notebook, onto_the_site)}
    picture = output.get("data", {}).get("image/png")
    if picture:
        alt = output.metadata.get("image/png", {}).get("alt") or "Picture made by the code above"
        source = f"data:image/png;base64,{''.join(picture.split())}"
        output.data = {"text/html": f'<img class="img-fluid" src="{source}" alt="{html.escape(alt, quote=True)}">'}
    return output


def prepare():
    "Fill _proc/ with everything a renderer needs."
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir()
    for path in (ROOT / "_quarto.yml", HERE / "style.css", HERE / "favicon.svg"):
        shutil.copy(path, STAGE)
    sources = notebooks()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(executed, sources))
    for notebook, result in zip(sources, results, strict=True):
        target = STAGE / notebook.relative_to(NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page_of(notebook, result), target)
    from medmatting.report import write_pages

    write_pages(STAGE, ROOT)
    reference()


def reference():
    "A page for each module with the signatures and parameter tables of its public names, and an index of them."
    from smalldocs.api import Settings, build, package_modules

    settings = Settings(STAGE, ["medmatting"], out="api", root=ROOT)
    build(settings)
    rows = [(m.__name__.rpartition(".")[2], (m.__doc__ or "").strip().split("\n")[0].replace("|", "\\|")) for m in package_modules("medmatting")]
    lines = [f"| [`{name}`]({name}.qmd) | {summary} |" for name, summary in rows]
    text = ["---", "title: Reference", "description: Every public name, its parameters, their types and units", "---", "",
            "| module | |", "|---|---|", *lines]  # fmt: skip
    (STAGE / "api" / "index.qmd").write_text("\n".join(text) + "\n", encoding="utf-8")


# ---- README


def readme() -> str:
    "README.md: the executed home page with links from the repository's root; pictures of cells stay on the site."
    index = NBS / "index.ipynb"
    cells = nbformat.read(executed(index), as_version=4).cells
    parts = [part for cell in cells for part in in_readme(cell)]
    text = outside("\n\n".join(parts), index, lambda path: path.as_posix())
    return re.sub(r"\]\((?=\w+/\w+\.ipynb)", "](nbs/", text) + "\n"


def in_readme(cell) -> list[str]:
    "A cell of the home page as Markdown of the README: prose, code, tables."
    if cell.cell_type == "markdown":
        return [cell.source.strip()]
    code = [] if "#| echo: false" in cell.source else [f"```python\n{cell.source.strip()}\n```"]
    return code + [output.data["text/markdown"].strip() for output in cell.outputs if "text/markdown" in output.get("data", {})]


# ---- rendering


def render():
    "From _proc/ to _docs/, with Quarto or smalldocs."
    quarto = shutil.which("quarto")
    command = [quarto, "render", "--no-execute"] if quarto else [sys.executable, "-m", "smalldocs.cli", "render", "."]
    print("rendering with", "Quarto" if quarto else "smalldocs", flush=True)
    subprocess.run(command, cwd=STAGE, check=True)
    localise(STAGE / "_docs")
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / "_docs", SITE)


def localise(site: Path):
    "Let pages load KaTeX from the site and drop the web fonts that themes ask for."
    shutil.copytree(HERE / "katex", site / "site_libs" / "katex", ignore=shutil.ignore_patterns("SHA256SUMS"))
    rewrite(site, "*.css", lambda text, up: re.sub(r"@import\s*(?:url\([^)]*\)|\"[^\"]*\"|'[^']*')[^;]*;", "", text))
    katex = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist/?")
    rewrite(site, "*.html", lambda text, up: katex.sub(f"{up}site_libs/katex/", text))


def rewrite(site: Path, pattern: str, change):
    "Change every file of a kind; `change` gets its text and the way up to the site's root."
    for path in site.rglob(pattern):
        up = "../" * (len(path.relative_to(site).parts) - 1)
        text = path.read_text(encoding="utf-8")
        path.write_text(change(text, up), encoding="utf-8")


def main():
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    prepare()
    render()
    print(f"The website is in {SITE.relative_to(ROOT)}/: open {(SITE / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
