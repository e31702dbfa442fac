"""The benchmark runs, measures what it says, and its methods solve the same problem."""

import numpy as np
import pytest

from medmatting import bench


@pytest.fixture()
def small(monkeypatch):
    monkeypatch.setattr(bench, "CASES", {"small": lambda: bench.nodule_case((24, 32, 32), 9, 12)})


def test_measure_reports_the_case(small):
    row = bench.measure("small", "medmatting", repeats=1)
    assert row["unknown"] == int((bench.CASES["small"]()[1] == 128).sum()) > 1000
    assert row["seconds"] > 0 and row["megabytes"] >= 0


def test_methods_agree(small):
    image, trimap = bench.CASES["small"]()
    ours = bench.run_ours(image, trimap)
    assert abs(bench.run_assembled(image, trimap).clip(0, 1) - ours[trimap == 128]).max() < 1e-3


def test_memory_that_is_taken_is_seen():
    with bench.PeakMemory() as memory:
        block = np.ones(30_000_000)
        bench.time.sleep(0.05)
    assert memory.megabytes > 0.8 * block.nbytes / 1e6


def test_table_and_plot_are_written(tmp_path, monkeypatch):
    rows = iter([dict(case=c, method=m, unknown=9, seconds=s, megabytes=1.0)
                 for c in ("a", "b") for m, s in (("medmatting", 1.0), ("assembled matrix", 4.0))])
    monkeypatch.setattr(bench, "CASES", dict(a=None, b=None))
    monkeypatch.setattr(bench, "METHODS", {"medmatting": None, "assembled matrix": None})
    monkeypatch.setattr(bench, "_in_own_process", lambda case, method: next(rows))
    table = bench.run_benchmark(tmp_path)
    assert list(table.ratio) == [1, 4, 1, 4] and {p.name for p in tmp_path.iterdir()} == {"bench.csv", "bench.png"}


def test_every_method_gives_a_matte(small):
    image, trimap = bench.CASES["small"]()
    for run in (bench.run_learning_based, bench.run_random_walker):
        alpha = run(image, trimap)
        assert alpha.shape == trimap.shape and alpha[trimap == 255].min() == 1 and alpha[trimap == 0].max() == 0
    assert abs(bench.run_learning_based(image, trimap) - bench.run_ours(image, trimap)).max() < 1e-3


def test_scaling_is_measured_and_fitted(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure_bandwidth", lambda: 10.0)
    table, exponent = bench.run_scaling(tmp_path, sizes=(12, 16, 24))
    assert table.unknown.is_monotonic_increasing and (table.stored >= table.unknown).all() and (table.iterations > 0).all()
    assert (table.bound == table.iterations * table.stored * bench.BYTES / 10e9).all() and np.isfinite(exponent)
    assert {p.name for p in tmp_path.iterdir()} == {"scaling.csv", "scaling.png"}


def test_bandwidth_is_plausible():
    assert 0.1 < bench.measure_bandwidth(2) < 10_000
