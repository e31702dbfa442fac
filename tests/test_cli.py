"""The command line as a user runs it: real files, exit status, one sentence on refusal, nothing lost."""

import json
import subprocess
import sys

import numpy as np
import pytest

import medmatting as mm
from medmatting.cli import main
from medmatting.lidc import nodule


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A real nodule as NIfTI: CT, four readers, trimap."
    folder, case = tmp_path_factory.mktemp("nodule"), nodule("LIDC-IDRI-0003_nodule4")
    mm.write(folder / "ct.nii.gz", case.ct)
    for number, mask in enumerate(case.masks):
        mm.write(folder / f"r{number}.nii.gz", mask.astype(np.uint8), like=case.ct)
    trimap = mm.trimap_from_raters(case.masks, 1.0, 0.0, spacing=case.ct.spacing)
    mm.write(folder / "trimap.nii.gz", trimap, like=case.ct)
    return folder


def run(*words):
    return main([str(word) for word in words])


def readers(files):
    return [files / f"r{number}.nii.gz" for number in range(4)]


def test_matte_from_raters_equals_the_function(files, tmp_path, capsys):
    out, info = tmp_path / "alpha.nii.gz", tmp_path / "info.json"
    assert run("matte", files / "ct.nii.gz", "--raters", *readers(files), "--erode-mm", 0, "--method", "cf+",
               "-o", out, "--info", info) == 0
    ct = mm.read(files / "ct.nii.gz")
    expected = mm.matte(ct, mm.read(files / "trimap.nii.gz"), "cf+")
    alpha = mm.read(out)
    assert np.array_equal(alpha.array, expected.array) and alpha.array.dtype == np.float32
    assert np.allclose(alpha.origin, ct.origin) and alpha.spacing == pytest.approx(ct.spacing)
    account = json.loads(info.read_text())
    assert account["method"] == "cf+" and account["residual"] <= 1e-6 and account["parameters"]["eps"] == 1e-7
    assert "relative residual" in capsys.readouterr().out


def test_resampled_matte_returns_on_the_native_grid(files, tmp_path):
    out = tmp_path / "alpha.nrrd"
    assert run("matte", files / "ct.nii.gz", "--trimap", files / "trimap.nii.gz", "--resample", 1, "-o", out) == 0
    alpha, ct = mm.read(out), mm.read(files / "ct.nii.gz")
    assert alpha.shape == ct.shape and alpha.spacing == pytest.approx(ct.spacing) and 0 < alpha.array.mean() < 0.1


def test_dicom_series_in_mask_band_out(files, tmp_path):
    pytest.importorskip("pydicom")
    assert run("matte", files / "ct.nii.gz", "--mask", files / "r0.nii.gz", "--band-mm", 1.5, "-o", tmp_path / "a.npy",
               "--hu-range", -1000, 400) == 0
    assert np.load(tmp_path / "a.npy", allow_pickle=False).max() == 1


def test_photograph_and_score(tmp_path, capsys):
    from medmatting.photographs import composite

    scene = composite("coffee")
    for name, array in [("image", scene.image), ("trimap", scene.trimap_r10), ("truth", scene.alpha)]:
        mm.write(tmp_path / f"{name}.png", np.asarray(array))
    assert run("matte", tmp_path / "image.png", "--trimap", tmp_path / "trimap.png", "-o", tmp_path / "alpha.png", "--bits", 16) == 0
    capsys.readouterr()
    assert run("score", tmp_path / "alpha.png", tmp_path / "truth.png", "--trimap", tmp_path / "trimap.png", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"] == "alphamatting" and result["mse"] < 0.002
    assert run("score", tmp_path / "truth.png", tmp_path / "truth.png", "--trimap", tmp_path / "trimap.png",
               "--protocol", "region-aware-2d") == 0
    assert "sad                0\n" in capsys.readouterr().out


def test_nothing_is_replaced_unasked(files, tmp_path, capsys):
    out = tmp_path / "alpha.nii.gz"
    out.write_bytes(b"an older result")
    words = ["matte", files / "ct.nii.gz", "--trimap", files / "trimap.nii.gz", "-o", out]
    assert run(*words) == 2 and out.read_bytes() == b"an older result"
    assert run(*words, "--eps", -1, "--overwrite") == 2 and out.read_bytes() == b"an older result"
    assert run(*words, "--overwrite") == 0 and mm.read(out).array.max() == 1
    assert {path.name for path in tmp_path.iterdir()} == {"alpha.nii.gz"}


def one_sentence(capsys):
    error = capsys.readouterr().err
    assert error.startswith("medmatting: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize("words, said", [
    (["{d}/absent.nii.gz", "--trimap", "{d}/trimap.nii.gz"], "absent"),
    (["{d}/cut.nii.gz", "--trimap", "{d}/trimap.nii.gz"], "cut"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/ct.nii.gz"], "trimap"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/r0.nii.gz"], "trimap"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/shifted.nii.gz"], "grid|mm away"),
    (["{d}/ct.nii.gz", "--mask", "{d}/ct.nii.gz"], "mask"),
    (["{d}/ct.nii.gz", "--raters", "{d}/r0.nii.gz"], "rater|mask"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/trimap.nii.gz", "--method", "magic"], "method"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/trimap.nii.gz", "--hu-range", "400", "-1000"], "hu_range"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/trimap.nii.gz", "--resample", "0"], "spacing"),
    (["{d}", "--trimap", "{d}/trimap.nii.gz"], "DICOM"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/elsewhere.npz"], "grid|mm away|spacing"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/trimap.nii.gz", "--option", "tol", "1"], "--option"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/trimap.nii.gz", "--option", "eps", "null"], "eps"),
    (["{d}/ct.nii.gz", "--trimap", "{d}/trimap.nii.gz", "--info", "{o}"], "--info"),
])
def test_refusals_are_one_sentence(files, tmp_path, capsys, words, said):
    whole = (files / "ct.nii.gz").read_bytes()
    (files / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    trimap = mm.read(files / "trimap.nii.gz")
    mm.write(files / "shifted.nii.gz", mm.Volume(trimap.array, spacing=trimap.spacing, origin=(50, 0, 0)))
    mm.write(files / "elsewhere.npz", mm.Volume(trimap.array, spacing=trimap.spacing, origin=(500, 0, 0)))
    status = run("matte", *[word.format(d=files, o=tmp_path / "alpha.nii.gz") for word in words], "-o", tmp_path / "alpha.nii.gz")
    assert status in (1, 2) and not list(tmp_path.iterdir())
    import re
    assert re.search(said, one_sentence(capsys))


def test_full_disk_is_one_sentence_and_keeps_the_old_file(files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "alpha.npy"
    out.write_bytes(b"an older result")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert run("matte", files / "ct.nii.gz", "--trimap", files / "trimap.nii.gz", "-o", out, "--overwrite") == 1
    assert "No space left" in one_sentence(capsys) and out.read_bytes() == b"an older result"
    assert len(list(tmp_path.iterdir())) == 1


def test_no_convergence_is_one_sentence(files, tmp_path, capsys):
    assert run("matte", files / "ct.nii.gz", "--trimap", files / "trimap.nii.gz", "--tol", 1e-30, "-o", tmp_path / "a.npy") == 1
    assert "not converged" in one_sentence(capsys) and not list(tmp_path.iterdir())


def test_data_commands(capsys):
    assert run("data", "list") == 0 and "lidc_nodules" in capsys.readouterr().out
    assert run("data", "verify", "lidc_nodules") == 0 and "right SHA-256" in capsys.readouterr().out
    assert run("data", "fetch") == 2 and "name" in one_sentence(capsys)
    assert run("data", "verify", "lidc_nodule") in (1, 2) and "lidc_nodules" in one_sentence(capsys)


def test_data_simnod_makes_continues_and_refuses(tmp_path, capsys):
    words = ("data", "simnod", "--seed", 3, "-o", tmp_path, "-j", 1)
    assert run(*words, "--cases", 1) == 0 and "1 made, 0 kept" in capsys.readouterr().out
    assert run(*words, "--cases", 2) == 0 and "1 made, 1 kept" in capsys.readouterr().out
    assert (tmp_path / "simnod64-3-0001" / "alpha.nii.gz").is_file() and len((tmp_path / "simnod64-3.csv").read_text().splitlines()) == 3
    assert run("data", "simnod", "--cases", 0, "-o", tmp_path) == 2 and "cases" in one_sentence(capsys)
    assert run("data", "simnod", "lidc_nodules") == 2 and "-o" in one_sentence(capsys)
    assert run("data", "list", "--cases", 5) == 2 and "--cases" in one_sentence(capsys)


def test_program_help_version_and_usage():
    call = lambda *words: subprocess.run([sys.executable, "-m", "medmatting", *words], capture_output=True, text=True)
    assert call("--version").stdout.startswith("medmatting ")
    for words in (["--help"], *[[command, "--help"] for command in ("matte", "score", "data", "reproduce")]):
        done = call(*words)
        assert done.returncode == 0 and "usage:" in done.stdout
    assert call("matte").returncode == 2 and "required" in call("matte").stderr
    assert call("matte", "-o", "x.npy").returncode == 2
    assert call("reproduce", "no-such-item").returncode == 2


@pytest.fixture()
def cohort(files, tmp_path):
    "Three cases to matte: from raters, from a trimap, and one that cannot work."
    import shutil

    folder = tmp_path / "cases"
    for name in ("a", "b", "broken"):
        (folder / name).mkdir(parents=True)
        shutil.copy(files / "ct.nii.gz", folder / name / "image.nii.gz")
    for number in range(2):
        shutil.copy(files / f"r{number}.nii.gz", folder / "a" / f"rater{number}.nii.gz")
    shutil.copy(files / "trimap.nii.gz", folder / "b" / "trimap.nii.gz")
    return folder


def test_batch_does_what_it_can_lists_failures_and_resumes(cohort, files, tmp_path, capsys):
    out = tmp_path / "mattes"
    words = ("matte", "--batch", cohort, "-o", out, "-j", 2, "--erode-mm", 0, "--hu-range", -1000, 400)
    assert run(*words) == 1
    said = capsys.readouterr()
    assert "broken" in said.err and "image.*" in said.err and said.err.count("\n") == 1
    assert {path.name for path in out.iterdir()} == {"a.nii.gz", "b.nii.gz"}
    expected = mm.matte(mm.read(files / "ct.nii.gz"), mm.read(files / "trimap.nii.gz"), hu_range=(-1000, 400))
    assert np.array_equal(mm.read(out / "b.nii.gz").array, expected.array)
    before = (out / "a.nii.gz").stat().st_mtime_ns
    (out / "b.nii.gz").unlink()
    (cohort / "broken" / "mask.nii.gz").write_bytes((files / "r0.nii.gz").read_bytes())
    assert run(*words) == 0 and "1 done before" in capsys.readouterr().out
    assert (out / "a.nii.gz").stat().st_mtime_ns == before and (out / "broken.nii.gz").exists() and (out / "b.nii.gz").exists()


@pytest.mark.parametrize("words", [["--batch", "{d}/absent"], ["--batch", "{d}", "--jobs", "0"], ["{d}/x.nii"], []])
def test_batch_words_are_checked(tmp_path, capsys, words):
    assert run("matte", *[word.format(d=tmp_path) for word in words], "-o", tmp_path / "o") == 2
    assert one_sentence(capsys)


def test_a_picture_can_be_resampled(tmp_path):
    rng = np.random.default_rng(0)
    mm.write(tmp_path / "image.png", rng.integers(0, 256, (20, 24), dtype=np.uint8))
    mm.write(tmp_path / "trimap.png", np.tile(np.repeat(np.uint8([0, 128, 255]), 8), (20, 1)))
    assert run("matte", tmp_path / "image.png", "--trimap", tmp_path / "trimap.png", "--resample", 0.5, "-o", tmp_path / "a.png") == 0
    assert mm.read(tmp_path / "a.png").shape == (20, 24)


@pytest.mark.parametrize("where", ["medmatting.matting.pcg_within", "nibabel.save"])
def test_control_c_leaves_no_file(files, tmp_path, where):
    "A real SIGINT while alpha is solved for, and while it is written."
    module, name = where.rsplit(".", 1)
    code = f"""
import importlib, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
module = importlib.import_module({module!r})
original = module.{name}
def interrupted(*arguments, **options):
    {"original(*arguments, **options)" if name == "save" else "pass"}
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
module.{name} = interrupted
from medmatting.cli import main
sys.exit(main(sys.argv[1:]))
"""
    words = ["matte", files / "ct.nii.gz", "--trimap", files / "trimap.nii.gz", "-o", tmp_path / "alpha.nii.gz"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 130 and "interrupted; nothing half-written was left" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
