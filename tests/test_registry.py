"""Downloads against a server on this machine that cuts, ignores, lies and disappears."""
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import numpy as np
import pytest

from medmatting import registry
from medmatting.checks import InputError, WriteError
from medmatting.registry import DataError, DataFile, Dataset

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Home(ThreadingHTTPServer):
    "A home of one file; the attributes say how it behaves."

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.ranges, self.status, self.declare = CONTENT, True, 200, True
        self.cuts = []  # for each connection in turn: bytes after which it is cut
        self.asked, self.sent = [], []  # Range header and bytes sent of every connection
        self.hold = None  # (bytes, event): send so many bytes, then wait for the event

    address = property(lambda self: f"http://127.0.0.1:{self.server_port}/file.bin")

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        home, asked = self.server, self.headers.get("Range")
        home.asked.append(asked)
        start = int(re.match(r"bytes=(\d+)-$", asked)[1]) if asked and home.ranges else 0
        if home.status >= 400:
            return self.send_error(home.status)
        if start >= len(home.content):
            return self.send_error(416)
        body = home.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(home.content) - 1}/{len(home.content)}")
        if home.declare:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        home.sent.append(self.send(body))
        self.close_connection = True

    def send(self, body):
        cut = self.server.cuts.pop(0) if self.server.cuts else len(body)
        if self.server.hold:
            first, event = self.server.hold
            self.wfile.write(body[:first])
            self.wfile.flush()
            event.wait(30)
            return first
        self.wfile.write(body[:cut])
        return min(cut, len(body))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def home(monkeypatch, tmp_path):
    server = Home()
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(registry, "PAUSE", 0)
    monkeypatch.setenv("MEDMATTING_DATA", str(tmp_path / "data"))
    register(monkeypatch, server.address)
    yield server
    if server.hold:
        server.hold[1].set()
    server.shutdown()
    server.server_close()


def register(monkeypatch, address, size=len(CONTENT), sha256=SHA256):
    file = DataFile("file.bin", size, sha256, address)
    monkeypatch.setitem(registry.DATASETS, "toy", Dataset("toy", "", "", "", "", "", fetched=(file,)))


def fetch():
    return registry.fetch("toy", progress=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".fetching.lock") if folder.exists() else []


def toy_folder():
    return registry.data_folder() / "toy"


def test_normal_download_then_a_good_copy_is_not_fetched_again(home):
    folder = fetch()
    assert (folder / "file.bin").read_bytes() == CONTENT and names(folder) == ["file.bin"]
    assert fetch() == folder and len(home.asked) == 1
    assert registry.is_present("toy") and registry.locate("toy") == folder


@pytest.mark.parametrize("place", ["toy/file.bin", "file.bin"])
def test_a_copy_placed_by_hand_is_used_in_both_layouts(home, place):
    target = registry.data_folder() / place
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert fetch() == target.parent == registry.locate("toy") and home.asked == []
    assert names(target.parent) == ["file.bin"]


def test_wrong_hash_is_refused_and_not_kept(home):
    home.content = bytes(len(CONTENT))
    with pytest.raises(DataError, match=SHA256):
        fetch()
    assert names(toy_folder()) == []


def test_a_damaged_copy_is_replaced_only_by_a_good_one(home):
    toy_folder().mkdir(parents=True)
    (toy_folder() / "file.bin").write_bytes(b"old")
    home.status = 404
    with pytest.raises(DataError):
        fetch()
    assert (toy_folder() / "file.bin").read_bytes() == b"old"
    home.status = 200
    assert (fetch() / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("declare", [True, False])
def test_cut_connection_is_continued_without_sending_a_byte_twice(home, declare):
    home.declare, home.cuts = declare, [100_000, 50_000]
    assert (fetch() / "file.bin").read_bytes() == CONTENT
    assert home.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert sum(home.sent) == len(CONTENT)


def test_attempts_are_limited_and_the_part_stays_for_the_next_call(home):
    home.cuts = [1000] * registry.ATTEMPTS
    with pytest.raises(DataError, match="connection closed after 4000 of 300000 bytes"):
        fetch()
    assert names(toy_folder()) == ["file.bin.part"]
    fetch()
    assert home.asked[-1] == "bytes=4000-" and sum(home.sent) == len(CONTENT)


def test_server_without_range_starts_again(home):
    home.ranges, home.cuts = False, [100_000]
    assert (fetch() / "file.bin").read_bytes() == CONTENT
    assert home.asked == [None, "bytes=100000-"]


@pytest.mark.parametrize("part", [b"stale" * 100, bytes(len(CONTENT)), bytes(len(CONTENT) + 5)])
def test_a_stale_part_is_found_out_by_the_hash(home, part):
    toy_folder().mkdir(parents=True)
    (toy_folder() / "file.bin.part").write_bytes(part)
    assert (fetch() / "file.bin").read_bytes() == CONTENT
    assert names(toy_folder()) == ["file.bin"]


def test_no_network_tells_how_to_place_the_file_by_hand(home, monkeypatch):
    home.shutdown(), home.server_close()
    with pytest.raises(DataError) as refusal:
        fetch()
    message = str(refusal.value)
    assert all(text in message for text in (home.address, SHA256, str(toy_folder()), "300000 bytes"))
    assert "\n" not in message and names(toy_folder()) == []
    monkeypatch.setattr(home, "shutdown", lambda: None)


@pytest.mark.parametrize("status, connections", [(404, 1), (403, 1), (503, registry.ATTEMPTS), (429, registry.ATTEMPTS)])
def test_http_errors(home, status, connections):
    home.status = status
    with pytest.raises(DataError, match=str(status)):
        fetch()
    assert len(home.asked) == connections and names(toy_folder()) == []


@pytest.mark.parametrize("declare", [True, False])
def test_a_server_that_sends_more_is_cut_off(home, declare):
    home.declare, home.content = declare, CONTENT + bytes(50_000_000)
    with pytest.raises(DataError, match="more than the 300000 bytes"):
        fetch()
    assert names(toy_folder()) == [] and len(home.asked) == 1


def test_silent_server_is_given_up(home, monkeypatch):
    home.hold = (1000, Event())
    monkeypatch.setattr(registry, "TIMEOUT", 0.2)
    monkeypatch.setattr(registry, "ATTEMPTS", 2)
    with pytest.raises(DataError, match="2 attempts"):
        fetch()


CHILD = """
from medmatting import registry
file = registry.DataFile("file.bin", {size}, "{sha256}", "{address}")
registry.DATASETS["toy"] = registry.Dataset("toy", "", "", "", "", "", fetched=(file,))
registry.fetch("toy", progress=False)
"""


def start_child(home):
    script = CHILD.format(size=len(CONTENT), sha256=SHA256, address=home.address)
    return subprocess.Popen([sys.executable, "-c", script])


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for too long")


def test_killed_process_is_continued(home):
    home.hold = (70_000, Event())
    child, part = start_child(home), toy_folder() / "file.bin.part"
    wait_until(lambda: part.exists() and part.stat().st_size == 70_000)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    home.hold[1].set()
    home.hold = None
    assert names(toy_folder()) == ["file.bin.part"]
    assert (fetch() / "file.bin").read_bytes() == CONTENT
    assert home.asked == [None, "bytes=70000-"]


def test_two_processes_take_turns(home):
    home.hold = (70_000, Event())
    child, part = start_child(home), toy_folder() / "file.bin.part"
    wait_until(lambda: part.exists() and part.stat().st_size == 70_000)
    second = Thread(target=fetch)
    second.start()
    second.join(0.3)
    assert second.is_alive() and len(home.asked) == 1  # it waits for the lock, and asks for nothing
    release, home.hold = home.hold[1], None
    release.set()
    second.join(30)
    assert child.wait(30) == 0
    assert (toy_folder() / "file.bin").read_bytes() == CONTENT
    assert home.asked == [None, "bytes=70000-"]  # the child continued after the cut; the other process never asked


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_full_disk(home):
    toy_folder().mkdir(parents=True)
    (toy_folder() / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(WriteError, match="No space left"):
        fetch()
    assert names(toy_folder()) == [] and len(home.asked) == 1


def test_folder_that_cannot_be_made(home, monkeypatch, tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    monkeypatch.setenv("MEDMATTING_DATA", str(tmp_path / "plain"))
    with pytest.raises(WriteError, match="another folder"):
        fetch()
    assert home.asked == []


def test_data_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDMATTING_DATA", str(tmp_path))
    assert registry.data_folder() == tmp_path
    monkeypatch.setenv("MEDMATTING_DATA", "")
    assert registry.data_folder().name == "medmatting"


def test_unknown_name_lists_the_known_ones():
    for function in (registry.fetch, registry.verify, registry.locate, registry.is_present):
        with pytest.raises(InputError, match="brain_growth"):
            function("brain")


def test_absent_set_is_refused_with_address_and_hash(tmp_path):
    for function in (registry.locate, registry.verify):
        with pytest.raises(DataError, match="raw.githubusercontent.com.*89abde1e.*421d90aa"):
            function("brain_growth", folder=tmp_path)


def test_every_embedded_set_verifies_and_lists():
    table = registry.data_list()
    assert list(table.index) == list(registry.DATASETS)
    for record in registry.DATASETS.values():
        if record.embedded:
            assert len(registry.verify(record.name)) == len(record.files) > 1
            assert table.state[record.name] == "with the package"
            assert registry.fetch(record.name) == registry.embedded_folder(record.name)


def test_every_embedded_file_is_listed_with_its_hash():
    for record in registry.DATASETS.values():
        if record.embedded:
            folder = registry.embedded_folder(record.name)
            on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            assert on_disk - {"README.md", "SHA256SUMS"} == {file.name for file in record.files}


def test_verify_names_the_damaged_file(home):
    (fetch() / "file.bin").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(DataError, match="1 of 1 files .*file.bin.*medmatting data fetch toy"):
        registry.verify("toy")


def test_brain_growth_is_never_embedded():
    assert not registry.dataset("brain_growth").embedded
    assert not list(registry.embedded_folder("").rglob("*brain*"))
