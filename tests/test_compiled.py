"""Compiled loops: nothing at import, a notice when it takes long, and no folder needed."""

import subprocess
import sys
from types import SimpleNamespace

from medmatting.compiled import Notice, kernel

IMPORT = """
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    import medmatting.matting, medmatting.bench
print(len(recorder.buffer))
"""


def test_importing_compiles_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0" and not done.stderr


def test_a_loop_without_a_place_for_its_code_still_runs():
    space = {}
    exec("def twice(x):\n    return 2 * x", space)  # a function without a file: Numba finds no cache folder for it
    assert kernel(space["twice"])(4) == 8


def happening(module):
    function = lambda: None
    function.__module__ = module
    return SimpleNamespace(data=dict(dispatcher=SimpleNamespace(py_func=function)))


def test_the_notice_comes_once_and_only_for_our_loops(capsys):
    notice = Notice()
    for module, long in [("medmatting.energy", False), ("other", True), ("medmatting.energy", True), ("medmatting.energy", True)]:
        notice.on_start(happening(module))
        notice.on_end(happening(module))
        if not long:
            assert not capsys.readouterr().err  # a short wait is not worth a word
            notice._duration = 1.5
        elif module == "other":
            assert not capsys.readouterr().err
    assert capsys.readouterr().err.count("compiling") == 1
