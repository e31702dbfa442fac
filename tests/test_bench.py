"""The benchmark runs, measures what it says, keeps its rows, and its methods solve the same problem."""

import json
from functools import partial

import numpy as np
import pytest

from medmatting import bench
from medmatting.checks import InputError


@pytest.fixture()
def small(monkeypatch):
    cases = {"small": bench.Case(partial(bench.nodule_case, (16, 24, 24), 4, 8), bench.ON_VOLUMES),
             "photo": bench.Case(partial(bench.photograph_case, 64, False), bench.ON_PHOTOGRAPHS)}
    monkeypatch.setattr(bench, "CASES", cases)
    return {name: case.make() for name, case in cases.items()}


def test_measure_reports_the_case(small):
    row = bench.measure("small", "medmatting cf", runs=1)
    assert row["unknown"] == row["solved"] == int((small["small"][1] == 128).sum()) > 1000
    assert row["seconds"] > 0 and row["megabytes"] >= 0 and row["iterations"] > 5 and row["residual"] <= 1e-6


def test_methods_of_one_energy_agree(small):
    image, trimap = small["small"]
    ours, matrix, ichol, naive = (bench.METHODS[name].run(image, trimap) for name in ("medmatting cf", *bench.ON_VOLUMES[4:7]))
    assert all(abs(other.alpha.clip(0, 1) - ours.alpha).max() < 1e-4 for other in (matrix, ichol, naive))
    assert max(matrix.residual, ichol.residual, naive.residual) <= 1e-6 and ichol.iterations < matrix.iterations
    image, trimap = small["photo"]
    ours, theirs = (bench.METHODS[f"{name} cf"].run(image, trimap) for name in ("medmatting", "PyMatting"))
    assert abs(ours.alpha - theirs.alpha).mean() < 1e-3 and theirs.iterations > 0


def test_every_method_gives_a_matte(small):
    for case, (image, trimap) in small.items():
        for name in bench.CASES[case].methods:
            try:
                alpha = bench.METHODS[name].run(image, trimap).alpha
            except bench.LeftOut as reason:
                assert "OpenCV" in str(reason)
                continue
            known = trimap != 128
            assert alpha.shape == trimap.shape and np.abs(alpha - trimap / 255)[known].max() < 0.02  # OpenCV keeps 8 bits


def test_slices_that_pymatting_cannot_solve_are_not_counted():
    row = np.repeat(np.uint8([0, 128, 255]), 4)
    trimap = np.stack([np.tile(row, (12, 1)), np.full((12, 12), 128, np.uint8)])
    answer = bench.METHODS["PyMatting cf"].run(np.random.default_rng(0).random(trimap.shape), trimap)
    assert answer.note == "1 of 2 slices" and np.isnan(answer.alpha[1]).all() and np.isfinite(answer.alpha[0]).all()


def test_the_naive_form_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(bench, "naive_matrix", lambda image: pytest.fail("tried all the same"))
    monkeypatch.setattr(bench, "_memory_gb", lambda: 20.0)
    image, trimap = bench.CASES["nodule, thin band"].make()
    with pytest.raises(bench.LeftOut, match="718 million triplets and their sums need 20.1 GB"):
        bench.run_naive(image, trimap)


def test_memory_that_is_taken_is_seen():
    with bench.PeakMemory() as memory:
        block = np.ones(30_000_000)
        del block
    assert memory.megabytes == pytest.approx(240, rel=0.1)


def test_opencv_is_left_out_by_name(monkeypatch):
    monkeypatch.setattr(bench, "SYSTEM_PYTHON", "/nowhere/python3")
    with pytest.raises(bench.LeftOut, match="python3-opencv"):
        bench.run_opencv(np.zeros((4, 4)), np.zeros((4, 4), np.uint8))


ROWS = {("nodule, thin band", "medmatting cf"): (1.0, 100), ("nodule, thin band", "PyMatting cf"): (1.0, 50),
        ("nodule, thin band", "random walker"): (4.0, 100)}


def result(case, method, seconds, solved):
    return dict(case=case, method=method, voxels=1000, unknown=100, solved=solved, seconds=seconds, megabytes=1.0, iterations=3,
                residual=1e-7, stored=200, precision="single", note="")


def test_ratio_is_for_each_solved_voxel():
    table = bench.as_table([result(*names, *values) for names, values in ROWS.items()]).set_index("method")
    assert list(table.ratio) == [1, 2, 4] and list(table.us_per_voxel) == [1e4, 2e4, 4e4]


def test_rows_are_kept_and_failures_are_not(tmp_path, monkeypatch):
    asked = []

    def answer(name, *job):
        asked.append(job)
        return {"note": "failed: for once"} if len(asked) == 1 else dict(seconds=1.0, megabytes=2.0)

    monkeypatch.setattr(bench, "in_own_process", answer)
    assert bench.kept(tmp_path, "measure", "a", "b") == ({"note": "failed: for once"}, False)
    assert bench.kept(tmp_path, "measure", "a", "b") == (dict(seconds=1.0, megabytes=2.0), False)
    assert bench.kept(tmp_path, "measure", "a", "b") == (dict(seconds=1.0, megabytes=2.0), True) and len(asked) == 2


def test_some_rows_alone_are_kept_and_can_be_measured_again(tmp_path, monkeypatch, capsys):
    asked = []

    def answer(name, *job):
        asked.append(job)
        return result(*job, seconds=float(len(asked)), solved=100)

    monkeypatch.setattr(bench, "in_own_process", answer)
    monkeypatch.setattr(bench, "find_root", lambda: tmp_path)
    monkeypatch.setattr(bench, "key", lambda: "key")
    monkeypatch.setattr(bench, "_memory_gb", lambda: 64.0)
    case, method = "photograph 512², colour", "PyMatting knn"
    chosen = ["--case", case, "--method", method, "--method", "medmatting knn"]
    assert bench.main(chosen) == bench.main(chosen) == 0
    assert asked == [(case, "medmatting knn"), (case, method)] and "(kept)" in capsys.readouterr().out
    assert bench.main([*chosen[:4], "--again"]) == 0 and asked[2:] == [(case, method)]
    assert not (tmp_path / "figures").exists()  # published files belong to a complete run
    kept_rows = bench.measure_all(tmp_path / "build/bench/key", {case: bench.Case(None, (method,))})
    assert kept_rows[0]["seconds"] == 3.0 and len(asked) == 3


@pytest.mark.parametrize("chosen", [["--case", "nothing"], ["--method", "nothing"]])
def test_rows_that_do_not_exist_are_refused(chosen):
    with pytest.raises(SystemExit):
        bench.main(chosen)


def test_a_method_that_a_case_does_not_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "find_root", lambda: tmp_path)
    with pytest.raises(InputError, match="^method: "):
        bench.main(["--case", "one nodule in 64³", "--method", "PyMatting knn"])


def test_key_follows_the_sources(monkeypatch):
    before = bench.key()
    assert before == bench.key()
    monkeypatch.setattr(bench, "package_hash", lambda: "another")
    assert bench.key() != before


def test_a_job_that_fails_says_why_in_one_line():
    assert "KeyError" in bench.in_own_process("measure", "no such case", "medmatting cf")["note"]


def test_what_needs_more_memory_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_memory_gb", lambda: 4.0)
    row, = bench.measure_all(tmp_path, {"large": bench.Case(None, ("medmatting cf",), 8)})
    assert row["note"] == "left out: 8 GB of free memory are needed"


def test_tables_and_plots_are_written(tmp_path, monkeypatch):
    def answer(folder, name, *job):
        if name == "measure_bandwidth":
            return 1e10, False
        if job[1] == "OpenCV if":
            return {"note": "not here"}, False
        size = 10_000 * 2 ** list(bench.CASES).index(job[0])
        return result(*job, size / 1e6, size) | dict(unknown=size, stored=2 * size, ms_per_iteration=2.0), True

    monkeypatch.setattr(bench, "kept", answer)
    monkeypatch.setattr(bench, "_memory_gb", lambda: 64.0)
    monkeypatch.setattr(bench, "find_root", lambda root: root)
    assert bench.last_run(tmp_path) == "Not run yet: `make bench`."
    table, growth, volume = bench.run_benchmark(tmp_path)
    folder = tmp_path / "figures/bench"
    records = {f"{name}.provenance.json" for name in bench.OUTPUTS}
    assert {p.name for p in folder.iterdir()} == {*bench.OUTPUTS, *records} and [p.name for p in tmp_path.iterdir()] == ["figures"]
    assert len(table) == 2 * len(bench.ON_VOLUMES) + 2 * len(bench.IN_AN_EIGHTH) + 4 * len(bench.ON_PHOTOGRAPHS)
    text = (folder / "bench.md").read_text()
    assert "| nodule, thin band | medmatting cf |" in text and "not here" in text
    page = bench.last_run(tmp_path)
    assert text.strip() in page and "](../figures/bench/bench.png)" in page and page.count("<summary>Provenance") == 5
    record = json.loads((folder / "bench.png.provenance.json").read_text())
    assert record["outputs"]["bench.png"]["sha256"] == bench.sha256_of(folder / "bench.png") and record["profile"] == "complete"
    assert record["hardware"] == bench.hardware() and record["made_from"]["versions"] == bench.versions()
    ours = growth[growth.method == "medmatting cf"]
    assert np.allclose(ours.share_of_bound, 1e3 * ours.stored * 111 / 1e10 / 2.0) and len(volume) == len(bench.VOLUME)


@pytest.mark.parametrize("precision, number", [("single", np.float32), ("double", np.float64)])
def test_bytes_moved_are_those_of_the_arrays(precision, number):
    "Every array of an iteration, once for each pass that reads or writes it; windows and runs as if every voxel had one."
    from medmatting.closed_form import ClosedForm
    from medmatting.energy import make_region

    image, trimap = bench.nodule_case((12, 24, 24), 4, 8)
    region = make_region(trimap)
    values = region.spans.gather(image[region.box])[None].astype(number)
    system = ClosedForm(region, values, region.spans.gather((trimap[region.box] == 255) * 1.0))
    slope, offset = system.fits
    x, r, p, q = system.start(), system.zeros(), system.zeros(), system.zeros()
    passes = [
        (system.image, p, system.products),
        (p, system.products, system.centre, system.matrix, system.weight, slope, offset),
        (slope, offset, system.count, region.unknown, p, system.image, q),
        (x, x, p, r, r, q, system.jacobi),
        (p, p, r, system.jacobi),
    ]
    assert bench.bytes_moved(precision) == sum(array.itemsize for arrays in passes for array in arrays)


def test_exponent_of_a_power_law():
    rows = [result("ball in 16³", "medmatting cf", 1e-7 * n**1.25, n) | dict(unknown=n) for n in (10_000, 50_000, 400_000)]
    slow_start = result("ball in 16³", "medmatting cf", 1.0, 1000) | dict(unknown=1000)
    assert bench.exponents(bench.as_growth([slow_start, *rows], 1e10))["medmatting cf"] == pytest.approx(1.25)


def test_bandwidth_is_plausible():
    assert 0.1e9 < bench.measure_bandwidth(2) < 1e13


def test_a_row_can_be_written_as_text():
    json.dumps(bench.measure("ball in 16³", "medmatting cf", runs=1))
