"""The website, built as `make docs` builds it, opened page by page in a browser as a reader would."""

import functools
import http.server
import json
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from browser import launch
from build import NBS, ROOT, SITE, localise, notebooks, outside, prepare, render

# What every page must be, asked in the page itself.
LOOK = """() => ({
  title: document.title,
  lang: document.documentElement.lang,
  h1: document.querySelectorAll('h1').length,
  text: document.querySelector('main').innerText,
  pictures: [...document.images].map(i => ({source: i.src.slice(0, 80), width: i.naturalWidth, alt: i.getAttribute('alt')})),
  links: [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href')),
  ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  maths: [...document.querySelectorAll('main .katex')].map(e => e.getBoundingClientRect().width),
  unset: document.querySelectorAll('.katex-error').length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="session")
def site():
    prepare()
    render()
    return SITE


@pytest.fixture(scope="session")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = launch(playwright)
        yield running
        running.close()


@pytest.fixture(scope="session")
def seen(site, address, browser):
    "Every page as the browser found it: what it holds, what it asked for, what went wrong."
    pages = {}
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page, asked, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("requestfailed", lambda request, wrong=wrong: wrong.append(f"failed: {request.url}"))
        page.on("response", lambda answer, wrong=wrong: answer.status >= 400 and wrong.append(f"{answer.status}: {answer.url}"))
        page.on("console", lambda line, wrong=wrong: line.type in ("error", "warning") and wrong.append(line.text))
        page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
        page.goto(address + name, wait_until="networkidle")
        page.wait_for_function("[...document.images].every(i => i.complete)")
        pages[name] = {**page.evaluate(LOOK), "asked": asked, "wrong": wrong}
        page.set_viewport_size({"width": 400, "height": 800})
        pages[name]["wide on a telephone"] = page.evaluate(LOOK)["wide"]
        page.close()
    return pages


def problems(seen, ask):
    "Pages for which `ask` finds something, with what it finds."
    return {name: found for name, page in seen.items() if (found := ask(page))}


def test_every_notebook_and_result_has_a_page(seen):
    expected = {path.relative_to(NBS).with_suffix(".html").as_posix() for path in notebooks()}
    assert expected | {"results/index.html", "claims.html", "api/index.html"} <= set(seen)


def test_every_page_is_reached_from_the_navigation(seen):
    home = {urljoin("/", urldefrag(link).url).lstrip("/") for link in seen["index.html"]["links"]}
    assert set(seen) - home - {"index.html"} == set()


def test_nothing_goes_wrong_in_the_browser(seen):
    assert problems(seen, lambda page: page["wrong"]) == {}


def test_nothing_is_loaded_from_elsewhere(seen, address):
    elsewhere = lambda page: [url for url in page["asked"] if not url.startswith((address, "data:", "blob:"))]
    assert problems(seen, elsewhere) == {}


def test_pictures_are_there_and_told_in_words(seen):
    poor = lambda page: [p for p in page["pictures"] if not p["width"] or not (p["alt"] or "").strip()]
    assert problems(seen, poor) == {}
    assert sum(len(page["pictures"]) for page in seen.values()) > 20


def test_links_inside_the_site_lead_somewhere(seen, site):
    def broken(name, page):
        for link in page["links"]:
            if urlparse(link).scheme:
                continue
            target, anchor = urldefrag(urljoin(f"/{name}", link))
            path = unquote(target.lstrip("/")) or "index.html"
            path += "index.html" if path.endswith("/") else ""
            if path in seen and anchor and unquote(anchor) not in seen[path]["ids"]:
                yield f"{link} (no such heading)"
            elif not (site / path).is_file():
                yield link

    assert {name: found for name, page in seen.items() if (found := list(broken(name, page)))} == {}


def test_mathematics_is_set(seen):
    assert problems(seen, lambda page: page["unset"]) == {}
    assert problems(seen, lambda page: [width for width in page["maths"] if width < 2]) == {}
    raw = re.compile(r"\$[^$\n]*\\[a-z]+[^$\n]*\$|\\\(|\\\[|\\frac|\\sum")
    prose = lambda page: raw.findall(re.sub(r"(?s)```.*?```", "", page["text"])) if page["maths"] else []
    assert problems(seen, lambda page: [m for m in prose(page) if m.startswith("$")]) == {}
    assert len(seen["12_closed_form.html"]["maths"]) > 5


def test_pages_have_a_title_a_language_and_one_heading(seen):
    assert problems(seen, lambda page: not page["title"] or page["lang"] != "en-GB" or page["h1"] != 1) == {}


def test_pages_fit_a_telephone(seen):
    assert problems(seen, lambda page: page["wide"] > 0 or page["wide on a telephone"] > 0) == {}


def test_no_traceback_and_no_machine_path_is_shown(seen):
    shown = lambda page: re.findall(r"Traceback \(most recent call last\)|/root/|/home/\w+|/work/\w+", page["text"])
    assert problems(seen, shown) == {}


def test_it_can_be_read_in_the_dark_and_by_keyboard(address, browser):
    context = browser.new_context(color_scheme="dark", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(address, wait_until="networkidle")
    style = "([place, what]) => getComputedStyle(document.querySelector(place))[what]"
    brightness = lambda *asked: sum(map(int, re.findall(r"\d+", page.evaluate(style, asked))[:3]))
    assert brightness("body", "backgroundColor") < 200 < 400 < brightness("body", "color")
    assert brightness("#quarto-sidebar", "backgroundColor") < 100 < 300 < brightness("#quarto-sidebar a", "color")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") in ("A", "BUTTON", "INPUT")
    context.close()


def test_pages_open_from_the_disk_too(site, browser):
    page, wrong = browser.new_page(), []
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto((site / "12_closed_form.html").as_uri(), wait_until="load")
    assert not wrong and page.locator("main .katex").count() > 5
    page.close()


def test_themes_and_scripts_of_other_hosts_are_replaced(tmp_path):
    (tmp_path / "site_libs").mkdir()
    (tmp_path / "deep").mkdir()
    style = tmp_path / "site_libs" / "theme.css"
    style.write_text("@import url(https://fonts.example/css2?family=A:wght@300;400&display=swap);:root{--a:1}")
    page = tmp_path / "deep" / "page.html"
    page.write_text('<script src="https://cdn.jsdelivr.net/npm/katex@0.16.11/dist/katex.min.js"></script>')
    localise(tmp_path)
    assert style.read_text() == ":root{--a:1}"
    assert page.read_text() == '<script src="../site_libs/katex/katex.min.js"></script>'
    assert (tmp_path / "site_libs/katex/katex.min.js").is_file()


def test_links_out_of_the_notebooks_are_respelled():
    text = "[a](../LICENSE) [b](tutorials/x.ipynb) ![c](../figures/d.png)"
    assert outside(text, NBS / "index.ipynb", lambda path: f"/{path.as_posix()}") == (
        "[a](/LICENSE) [b](tutorials/x.ipynb) ![c](/figures/d.png)")  # fmt: skip


def test_the_vendored_script_is_the_published_one():
    import hashlib

    folder = ROOT / "nbs/_website/katex"
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_the_search_finds_the_solver(site):
    entries = json.loads((site / "search.json").read_text(encoding="utf-8"))
    assert any("Closed-form" in entry.get("title", "") for entry in entries)
    assert Path(site / "12_closed_form.html").is_file()
