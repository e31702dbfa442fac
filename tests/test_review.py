"""The review page: what the session decides, what the tiles show, and the page driven in a browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from browser import launch
from medmatting import InputError, Volume, decisions
from medmatting import review as rv
from medmatting.labelling import LabelledCase, read_case
from miniature_labelling import SMALL, write_labelling


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    "A labelling that no test may decide in."
    return write_labelling(tmp_path_factory.mktemp("candidates"), cases=3)


@pytest.fixture
def labelling(candidates, tmp_path):
    "The same labelling, to decide in."
    import shutil

    shutil.copytree(candidates.folder, tmp_path / "labelling", dirs_exist_ok=True)
    return rv.open_existing(tmp_path / "labelling")


def lines(labelling):
    return decisions.open_decisions(labelling).read()


# ---- the session


def test_a_number_means_what_was_shown_and_the_order_is_recorded(labelling):
    session = rv.ReviewSession(labelling, " Ada ", seed=3)
    assert session.order == decisions.blind_order(SMALL.methods, "case-0", 3) and sorted(session.order) == sorted(SMALL.methods)
    rv.choose_number(session, 2)
    (line,) = lines(labelling)
    assert (line["reviewer"], line["method"], tuple(line["order"])) == ("Ada", session.order[1], session.order)
    assert rv.chosen_number(session) == 2
    for number in (0, 4, 9):
        with pytest.raises(InputError, match="from 1 to 3"):
            rv.choose_number(session, number)
    assert rv.ReviewSession(labelling, "Bob", blind=False).order == SMALL.methods


def test_a_review_goes_on_where_it_was_left(labelling):
    session = rv.ReviewSession(labelling, "Ada")
    rv.choose_number(session, 1)
    session.go(session.step(-1))
    assert session.case.name == "case-2"
    rv.choose_number(session, 1)
    again = rv.ReviewSession(labelling, "Ada")
    assert again.case.name == "case-1" and again.progress() == (2, 3) and again.next_open() == "case-1"
    assert rv.ReviewSession(labelling, "Bob").progress() == (0, 3)
    rv.choose_number(again, 1)
    assert again.next_open() is None and rv.ReviewSession(labelling, "Ada").case.name == "case-0"


def test_undo_opens_the_case_again(labelling):
    session = rv.ReviewSession(labelling, "Ada")
    rv.choose_number(session, 1)
    session.go("case-2")
    assert rv.undo_last(session)["case"] == session.case.name == "case-0" and session.progress() == (0, 3)


def test_candidates_that_look_alike_are_told(labelling):
    session = rv.ReviewSession(labelling, "Ada", blind=False)
    assert rv.alike_numbers(session, 1) == [3] and rv.alike_numbers(session, 2) == [] and rv.alike_numbers(session, 3) == [1]


def test_a_candidate_that_was_not_computed_is_not_offered(labelling):
    (labelling.case_folder("case-0") / "lb.json").unlink()
    session = rv.ReviewSession(labelling, "Ada")
    assert sorted(session.order) == ["cf", "cf+"]


def test_a_damaged_case_is_told_and_passed_over(labelling):
    trimap = labelling.case_folder("case-0") / "trimap.nii.gz"
    whole = trimap.read_bytes()
    trimap.write_bytes(b"damaged")
    page = rv.ReviewPage(rv.ReviewSession(labelling, "Ada"))
    assert page.session.case.name == "case-1"
    press(page, "1")
    assert page.session.case.name == "case-2" and "case-0" in page.judgement.said.value
    press(page, "d", "1")
    assert "All cases that can be read are decided" in page.judgement.said.value and page.session.progress() == (2, 3)
    press(page, "ArrowRight")
    assert page.session.case.name == "case-1"
    with pytest.raises(InputError, match="case-0"):
        page.session.go("case-0")
    trimap.write_bytes(whole)  # restored, it can be opened in the same session
    page.judgement.case.value = "case-0"
    press(page, "2")
    assert "All cases are decided" in page.judgement.said.value and page.session.progress() == (3, 3)


def test_a_labelling_without_a_whole_case_is_refused(labelling):
    for name in labelling.cases():
        (labelling.case_folder(name) / "trimap.nii.gz").unlink()
    with pytest.raises(InputError, match="case-0"):
        rv.ReviewSession(labelling, "Ada")


# ---- the view


def case_of(shape=(8, 20, 30), spacing=(2.0, 1.0, 0.5), direction=None):
    "A case without candidates, with a lesion away from the middle."
    trimap = np.zeros(shape, np.uint8)
    trimap[2:5, 3:9, 20:28] = 128
    trimap[3, 5:7, 23:25] = 255
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    volume = Volume(values, spacing, direction=direction, unit="HU")
    mask = volume.with_array((trimap > 0).astype(np.uint8), unit="")
    return LabelledCase("c", volume, mask.with_array(trimap), (mask,), {"cf": mask.with_array(trimap.astype(np.float32) / 255)}, {}, mask)


CASE = case_of()


@given(st.tuples(st.integers(0, 7), st.integers(0, 19), st.integers(0, 29)), st.integers(0, 2), st.booleans())
def test_a_click_on_the_cross_is_the_cursor(at, axis, zoomed):
    view = rv.View(at, (0, 1), axis, zoomed=zoomed)
    across, down = rv.place_of(CASE, view)
    if 0 < across < 1 and 0 < down < 1:
        assert rv.voxel_at(CASE, view, across, down) == at
    assert all(0 <= i < n for i, n in zip(rv.voxel_at(CASE, view, 5.0, -5.0), CASE.image.shape))


@given(st.tuples(st.integers(0, 7), st.integers(0, 19), st.integers(0, 29)), st.integers(0, 2), st.booleans())
def test_a_plane_shows_the_value_under_the_cursor_at_its_place(at, axis, zoomed):
    view = rv.View(at, (0, 1), axis, zoomed=zoomed)
    plane, (across, down) = rv.cut(CASE.image.array, CASE, view, -1), rv.place_of(CASE, view)
    if 0 < across < 1 and 0 < down < 1:
        assert plane[int(down * plane.shape[0]), int(across * plane.shape[1])] == CASE.image.array[at]
    first, count, side = rv.frame(CASE, zoomed)
    assert np.allclose(count * CASE.image.spacing, side, atol=max(CASE.image.spacing)) and set(np.unique(plane)) <= {-1, *CASE.image.array.ravel()}


def test_the_whole_lesion_is_visible_and_its_middle_comes_first():
    view = rv.first_view(CASE)
    assert CASE.trimap.array[view.at] == 255 and view.window == (-1350, 150)
    for axis in range(3):
        seen = rv.cut(CASE.trimap.array, CASE, rv.View(view.at, view.window, axis))
        assert (seen > 0).sum() == (np.take(CASE.trimap.array, view.at[axis], axis) > 0).sum()


def test_sides_follow_the_direction_of_the_volume():
    assert rv.side_letters(CASE.image, 0) == ("R", "L", "A", "P")
    assert rv.side_letters(CASE.image, 1) == ("R", "L", "H", "F") and rv.side_letters(CASE.image, 2) == ("A", "P", "H", "F")
    turned = case_of(direction=np.array([[0, 0, -1.0], [0, -1.0, 0], [1.0, 0, 0]])).image
    assert rv.side_letters(turned, 0) == ("L", "R", "P", "A")


# ---- the tiles


def test_a_tile_is_a_png_of_what_was_drawn(labelling):
    case = read_case(labelling, "case-0")
    drawn = rv.reference_picture(case, rv.first_view(case))
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(rv.png(drawn)))), drawn)


def test_tiles_show_matte_image_or_both(labelling):
    case = read_case(labelling, "case-0")
    view = rv.first_view(case)
    tiles = {mode: rv.candidate_picture(case, rv.replace(view, mode=mode), "cf") for mode in ("overlay", "matte", "image")}
    assert all(tile.shape == (rv.TILE, rv.TILE, 3) and tile.dtype == np.uint8 for tile in tiles.values())
    levels = rv.alpha_levels(case, view, "cf")
    outside, inside = levels == 0, levels == 255
    np.testing.assert_array_equal(tiles["overlay"][outside], tiles["image"][outside])
    away = np.abs(np.arange(rv.TILE) - rv.TILE / 2) > 20  # from the cross
    assert (tiles["matte"][np.ix_(away, away)] == levels[np.ix_(away, away)][..., None]).all()
    colour = np.ptp(tiles["overlay"].astype(int), axis=2)
    assert colour[inside].min() > 30 and colour[outside].max() == 0
    assert np.ptp(rv.reference_picture(case, view).astype(int), axis=2).max() > 50  # coloured outlines
    assert np.ptp(rv.reference_picture(case, rv.replace(view, outlines=False)).astype(int), axis=2).max() == 0


def test_the_window_maps_low_to_black_and_high_to_white():
    view = rv.View((3, 5, 23), (1000, 2000))
    grey = rv.grey(case_of((8, 20, 30), (1, 1, 1)), view)
    assert grey.min() == 0 and grey.max() == 255


# ---- the page, without a browser


@pytest.fixture
def page(labelling):
    made = rv.ReviewPage(rv.ReviewSession(labelling, "<i>Ada"))
    made.shown = 0.0
    return made


def press(page, *keys, looked=True):
    for key in keys:
        page.shown = 0.0 if looked else page.shown
        page.hear({"kind": "key", "key": key})


def test_keys_choose_discard_undo_and_each_is_saved_at_once(page, labelling):
    press(page, "2")
    assert len(lines(labelling)) == 1 and page.session.case.name == "case-1" and "saved" in page.judgement.said.value
    press(page, "d")
    assert "Esc" in page.judgement.said.value and len(lines(labelling)) == 1
    press(page, "Escape", "3")
    assert [x["action"] for x in lines(labelling)] == ["choose", "choose"] and page.session.case.name == "case-2"
    press(page, "d", "4")
    assert lines(labelling)[-1]["reason"] == decisions.REASONS[3] and "All cases are decided" in page.judgement.said.value
    press(page, "u")
    assert lines(labelling)[-1]["action"] == "undo" and page.session.case.name == "case-2" and page.session.progress() == (2, 3)


def test_a_decision_without_a_look_is_not_taken(page, labelling):
    press(page, "1")
    press(page, "1", looked=False)  # a key that bounced
    assert len(lines(labelling)) == 1 and "look" in page.judgement.said.value


def test_one_cursor_and_one_slice_drive_all_tiles(page):
    before = [picture.value for _, _, picture in page.tiles.cards]
    press(page, "ArrowUp")
    after = [picture.value for _, _, picture in page.tiles.cards]
    assert len(before) == 5 and all(a != b for a, b in zip(before, after)) and page.controls.slice.value == page.view.at[0]
    page.hear({"kind": "point", "tile": 3, "across": 0.25, "down": 0.75})
    assert page.view.at == rv.voxel_at(page.session.case, page.view, 0.25, 0.75)
    z = page.view.at[0]
    page.hear({"kind": "point", "tile": 1, "across": 0.5, "down": 0.3})  # the plane across moves the slice
    assert page.view.at[0] != z
    page.controls.slice.value = 2
    page.hear({"kind": "wheel", "steps": 1})
    assert page.view.at[0] == 1
    page.hear({"kind": "wheel", "steps": 10**6})
    assert page.view.at[0] == 0


def test_view_keys_and_window_drag(page):
    press(page, "o", "x", "z", "[")
    assert (page.view.mode, page.view.axis, page.view.zoomed, page.view.outlines) == ("matte", 1, False, False)
    press(page, "w")
    assert page.view.window == rv.limits(rv.MEDIASTINUM) and page.controls.window.value == "mediastinum"
    for across in (0.1, 0.25):
        page.hear({"kind": "window", "across": across, "down": 0.1, "fresh": 1})
    low, high = page.view.window
    assert high - low == pytest.approx(400 * 1.5) and (low + high) / 2 == pytest.approx(40 - 40) and page.controls.window.value == ""
    press(page, "2")
    assert page.view.mode == "matte" and page.view.window == (low, high)  # kept from case to case


def test_buttons_do_what_keys_do(page, labelling):
    page.shown = 0.0
    page.tiles.cards[3][0].children[0].children[0].click()
    page.judgement.note.value = "near a vessel"
    page.shown = 0.0
    page.judgement.reason.value = "my own reason"
    page.judgement.foot.children[0].click()
    page.judgement.foot.children[2].click()
    found = lines(labelling)
    assert [x["action"] for x in found] == ["choose", "note", "discard", "undo"] and found[2]["reason"] == "my own reason"
    page.judgement.case.value = "case-2"
    assert page.session.case.name == "case-2" and page.judgement.note.value == ""
    page.judgement.case.value = "case-1"
    assert page.judgement.note.value == "near a vessel" and len(lines(labelling)) == 4


def test_what_cannot_be_saved_is_said_and_the_case_stays(page, labelling, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decisions.os, "fsync", full)
    press(page, "1")
    assert "No space left" in page.judgement.said.value and page.session.case.name == "case-0" and page.session.progress() == (0, 3)
    monkeypatch.undo()
    press(page, "1")
    assert page.session.progress() == (1, 3)
    press(page, "9")
    assert "from 1 to 3" in page.judgement.said.value
    with open(labelling.folder / "decisions.jsonl", "ab") as file:
        file.write(b'{"number": 2')
    with pytest.warns(UserWarning):
        press(page, "2")
    assert "incomplete" in page.judgement.said.value and page.session.progress() == (2, 3)


def test_the_methods_stay_hidden_unless_asked_for(page, labelling):
    said = lambda page: " ".join(caption.value for _, caption, _ in page.tiles.cards[2:])
    assert not re.search(r"\b(cf|lb|knn|if)\b", said(page))
    assert "<b>cf+</b>" in said(rv.ReviewPage(rv.ReviewSession(labelling, "Bob", blind=False)))


def test_text_of_people_cannot_become_markup(page, labelling):
    press(page, "1")
    assert "&lt;i&gt;Ada" in page.judgement.progress.value and "<i>Ada" not in page.judgement.progress.value
    other = rv.ReviewPage(rv.ReviewSession(labelling, "Bob"))
    assert "&lt;i&gt;Ada" in other.judgement.agreement.value and "<i>Ada" not in other.judgement.agreement.value


def test_agreement_with_others_is_shown(page, labelling):
    press(page, "1", "1")
    other = rv.ReviewPage(rv.ReviewSession(labelling, "Bob"))
    press(other, "1", "d", "1")
    assert "1 of 2 cases equal (50 %)" in other.judgement.agreement.value


def test_a_name_is_asked_for(labelling):
    box = rv.review(labelling)
    name, start = box.children[0].children[1].children
    start.click()
    assert "reviewer" in box.children[0].children[2].value
    name.value = "Ada"
    start.click()
    assert "mm-review" in box.children[0]._dom_classes and len(box.children[0].children) == 6
    with pytest.raises(InputError, match="labelling.json"):
        rv.review(labelling.folder / "cases")


def test_the_server_asks_for_a_token_and_listens_here_only(labelling, monkeypatch, capsys):
    page, started = rv.write_page(labelling), []
    command = " ".join(rv.server_command(page, 4711, browser=False))
    assert "jupyterlab" in command and "token" not in command and "--ServerApp.ip=127.0.0.1" in command and "port=4711" in command
    assert json.loads(page.read_text())["cells"][0]["source"]

    class Ended:
        "A server that could not start."

        def __init__(self, command, cwd, env):
            started.append((command, cwd, env["JUPYTER_TOKEN"]))

        poll = wait = lambda self, patience=None: 3
        terminate = lambda self: None

    monkeypatch.setattr(rv.subprocess, "Popen", Ended)
    assert [rv.serve(labelling, browser=False) for _ in range(2)] == [3, 3] and "http" not in capsys.readouterr().out
    (_, folder, first), (_, _, second) = started
    assert folder == labelling.folder and first != second and min(len(first), len(second)) >= 32


def test_a_port_that_is_taken_is_refused(labelling):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for port in (taken.getsockname()[1], 70_000):
            with pytest.raises(InputError, match="port.*free port"):
                rv.serve(labelling, port)


# ---- the page in a browser


class Server:
    "`medmatting review`, as from a terminal."

    def __init__(self, labelling, home):
        places = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")}
        (home / "JUPYTER_CONFIG_DIR").mkdir(parents=True)
        self.log = open(home / "log", "w")
        command = [sys.executable, "-m", "medmatting", "review", str(labelling.folder), "--no-browser"]
        self.process = subprocess.Popen(command, env={**os.environ, **places, "JUPYTER_PREFER_ENV_PATH": "1", "NUMBA_NUM_THREADS": "1"},
                                        stdout=subprocess.PIPE, stderr=self.log, text=True, preexec_fn=self._listen)  # fmt: skip
        self.address = re.search(r"http://\S+", self.process.stdout.readline()).group()  # once it answers
        self.port = int(re.search(r"127\.0\.0\.1:(\d+)/doc/tree/review.ipynb\?token=\w{32,}$", self.address).group(1))

    @staticmethod
    def _listen():
        "Hear Ctrl-C, which a shell lets its background jobs ignore."
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def stop(self):
        "Ctrl-C."
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        self.log.close()


@pytest.fixture
def server(labelling, tmp_path):
    running = Server(labelling, tmp_path / "jupyter")
    try:
        yield running
    finally:
        running.stop()
    assert running.process.returncode == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", running.port), 1)


def grows(labelling, count):
    "The table, once it has so many lines."
    path = labelling.folder / "decisions.jsonl"
    for _ in range(600):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return [json.loads(line) for line in path.read_bytes().splitlines()]
        time.sleep(0.1)
    raise AssertionError(f"no line {count}")


def test_a_review_in_a_browser(labelling, server):
    from playwright.sync_api import sync_playwright

    with pytest.raises(urllib.error.HTTPError, match="403"):  # without the token
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/api/contents", timeout=30)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.set_default_timeout(180_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.address)
        page.wait_for_selector("text=/\\| Idle/")
        page.locator(".jp-Notebook .cm-content").first.click()
        page.keyboard.press("Shift+Enter")
        page.locator(".mm-review input").first.fill("Ada")
        page.keyboard.press("Enter")
        page.wait_for_selector(".mm-tile-4")
        page.wait_for_function("document.activeElement.classList.contains('mm-review')")
        shown = lambda text: page.wait_for_function("text => document.querySelector('.mm-said').innerText.includes(text)", arg=text)
        time.sleep(2 * rv.LOOK_S)

        page.keyboard.press("2")
        (first,) = grows(labelling, 1)
        assert (first["reviewer"], first["case"], first["method"]) == ("Ada", "case-0", first["order"][1])
        shown("saved")

        # Cursor and slice move with the mouse.
        number = lambda: int(page.locator(".mm-review .widget-readout").first.inner_text())
        before = number()
        page.locator(".mm-tile-3").hover()
        page.mouse.wheel(0, 100)
        page.wait_for_function("n => +document.querySelector('.mm-review .widget-readout').innerText !== n", arg=before)

        # D twice would delete a cell in JupyterLab; here it asks for a reason. A number in a note decides nothing.
        cells = page.locator(".jp-Cell").count()
        time.sleep(2 * rv.LOOK_S)  # a decision right after a case appeared counts as a bounced key
        page.keyboard.press("d")
        page.keyboard.press("d")
        shown("Discard because")
        page.keyboard.press("1")
        assert grows(labelling, 2)[1]["reason"] == decisions.REASONS[0]
        shown("saved")
        page.keyboard.press("n")
        page.keyboard.type("3 vessels")
        page.keyboard.press("Enter")
        assert grows(labelling, 3)[2]["text"] == "3 vessels" and page.locator(".jp-Cell").count() == cells
        page.wait_for_function("document.activeElement.classList.contains('mm-review')")
        time.sleep(2 * rv.LOOK_S)
        page.keyboard.press("u")
        assert grows(labelling, 4)[3]["undoes"] == 2
        shown("Taken back")
        assert [url for url in asked if not url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:"))] == []
        browser.close()
    assert rv.ReviewSession(labelling, "Ada").case.name == "case-1"  # and so it would go on
