"""The ledger of printed claims and the pages made from it."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmatting import claims, report
from medmatting.checks import InputError
from medmatting.manifest import MANIFEST
from medmatting.run import provenance_path

REPOSITORY = Path(__file__).parents[1]
HEAD = "measure,value,n,data,protocol\n"


def repository(folder, measures=None, claimed=(), profile="quick", name="item"):
    "A repository with one item that published these measures."
    place = folder / "nbs/experiments"
    if not place.exists():
        shutil.copytree(REPOSITORY / claims.PRINTED, folder / claims.PRINTED)
    cell = dict(cell_type="code", id="c0", metadata={"tags": ["parameters"]}, source='out_dir = ""', outputs=[],
                execution_count=None)
    (place / f"{name}.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    entry = dict(id=name, title="An item", paper="none", item="-", notebook=f"nbs/experiments/{name}.ipynb",
                 parameters={"quick": {}, "full": {}}, inputs=["brain_growth"], optional_data=["brain_growth"],
                 outputs={"measures.csv": {"caption": "Values"}, "table.csv": {"caption": "A table"}},
                 resources={"minutes": {"quick": 1, "full": 1}, "memory_gb": 1, "gpu": False}, claims=list(claimed))
    manifest = folder / MANIFEST
    items = json.loads(manifest.read_text())["items"] if manifest.exists() else []
    items = [item for item in items if item["id"] != name] + [entry]
    manifest.write_text(json.dumps({"items": items}))
    if measures is not None:
        path = folder / f"figures/{profile}/{name}/measures.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEAD + measures)
    return folder


def row(root, name):
    return next(line for line in claims.ledger(root) if line["id"] == name)


def brain(method, value, metric="sad", n=39, data="brain_growth"):
    return f"ra.t1.brain_growth.{method}.{metric},{value},{n},{data},region-aware-2d\n"


def test_every_printed_number_is_a_claim():
    "Counted straight from the CSV files, without the package."
    found = Counter(c.printed for c in claims.read_claims(REPOSITORY) if c.printed)
    expected = Counter()
    for name in ("region_aware_table1", "region_aware_table2", "three_d_table1"):
        with open(REPOSITORY / claims.PRINTED / f"{name}.csv", newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                expected.update(v for k, v in line.items() if k.partition("_")[0] in ("sad", "mse", "grad", "conn"))
    assert found == expected and sum(found.values()) == 27 * 3 + 8 * 3 + 6 * 8


def test_known_numbers_stand_where_the_papers_have_them():
    printed = {c.id: c.printed for c in claims.read_claims(REPOSITORY)}
    assert [printed[f"ra.t1.brain_growth.closed_form.{m}"] for m in ("sad", "mse", "grad")] == ["1.5419", "0.4410", "2.6960"]
    assert printed["td.t1.lb_plus.sad_std"] == "15.52" and printed["ra.t2.row8.grad"] == "0.0551"


def test_the_papers_own_tables_decide_only_two_statements():
    found = claims.read_claims(REPOSITORY)
    printed = {c.id: float(c.printed) for c in found if c.printed}
    against = [c.id for c in found if c.statement and claims.holds(c.relation, [printed.get(m) for m in c.measures]) is False]
    assert against == ["ra.s3_3.scales.sad", "td.s6_2_2.conn.rank"]


def test_the_ledger_in_the_repository_is_up_to_date():
    assert (REPOSITORY / "claims.csv").read_text(encoding="utf-8") == claims.ledger(REPOSITORY).csv()


# Relations

values = st.lists(st.floats(-10, 10), min_size=2, max_size=6, unique=True)


@given(values, st.integers(1, 3))
def test_a_rank_is_the_place_in_the_sorted_list(numbers, rank):
    place = sorted(numbers).index(numbers[0]) + 1
    assert claims.holds(f"rank {rank}", numbers) == (place == rank)


@given(values)
def test_below_and_above_mirror_each_other(numbers):
    assert claims.holds("below", numbers) == claims.holds("above", [-v for v in numbers]) == (numbers[0] == min(numbers))


@given(values, st.integers(1, 3), st.data())
def test_a_decision_with_gaps_is_never_wrong(numbers, rank, data):
    gaps = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    seen = [None if gap else v for gap, v in zip(gaps, numbers)]
    for relation in (f"rank {rank}", "below", "above"):
        assert claims.holds(relation, seen) in (None, claims.holds(relation, numbers))


def test_ties_and_single_answers():
    assert claims.holds("below", [1, 1]) is False and claims.holds("rank 1", [1, 1]) is False
    assert claims.holds("increasing", [1, 1]) is False and claims.holds("increasing", [1, None]) is None
    assert claims.holds("near", [1.04, 1.0]) and not claims.holds("near", [1.06, 1.0])
    assert claims.holds("holds", [0]) is False and claims.holds("holds", [None]) is None


# Verdicts

@pytest.mark.parametrize("value, n, data, verdict", [
    (0.6534, 39, "brain_growth", "reproduced"),
    (0.6534 * 1.049, 39, "brain_growth", "reproduced"),
    (0.6534 * 1.051, 39, "brain_growth", "partly"),
    (0.6534 * 0.81, 39, "brain_growth", "partly"),
    (0.6534 * 0.79, 39, "brain_growth", "contradicted"),
    (0.6534, 5, "brain_growth", "partly"),
    (0.3, 5, "brain_growth", "not attempted"),
    (0.6534, 39, "lidc_nodules", "not attempted"),
])
def test_verdict_of_a_number(tmp_path, value, n, data, verdict):
    found = row(repository(tmp_path, brain("knn", value, n=n, data=data)), "ra.t1.brain_growth.knn.sad")
    assert found["verdict"] == verdict and found["printed"] == "0.6534" and found["obtained"] == f"{value:.4f}"
    assert found["obtained_on"] == f"{data}, region-aware-2d, n = {n}, profile quick" and found["why"]
    assert found["provenance"] == "figures/quick/item/measures.csv.provenance.json"


def test_nothing_measured_says_what_is_missing(tmp_path):
    found = claims.ledger(repository(tmp_path))
    assert all(line["why"] for line in found) and not any(line["obtained"] for line in found)
    assert found.counts["not attempted"] == len(found) - 2
    assert "simnod_table1" in row(tmp_path, "td.t1.3dmm_without_masks.sad")["why"]


def test_verdict_of_an_ordering(tmp_path):
    methods = [c.split(".")[3] for c in next(c for c in claims.read_claims(REPOSITORY)
                                             if c.id == "ra.t1.brain_growth.sad.best").measures]
    everything = "".join(brain(m, 0.1 * n) for n, m in enumerate(methods, 1))
    assert row(repository(tmp_path, everything), "ra.t1.brain_growth.sad.best")["verdict"] == "reproduced"
    some = brain("ours", 0.3) + brain("knn", 0.2)
    assert row(repository(tmp_path, some), "ra.t1.brain_growth.sad.best")["verdict"] == "contradicted"
    some = brain("ours", 0.1) + brain("knn", 0.2)
    assert row(repository(tmp_path, some), "ra.t1.brain_growth.sad.best")["verdict"] == "not attempted"


def test_a_statement_on_other_data_is_at_most_partly_confirmed(tmp_path):
    root = repository(tmp_path, "td.f6.continuity,1,5,lidc_nodules,continuity\ntd.f6.discontinuity,0,5,lidc_nodules,continuity\n")
    assert row(root, "td.f6.continuity")["verdict"] == "partly"
    assert row(root, "td.f6.discontinuity")["verdict"] == "not attempted"


def test_the_full_profile_counts(tmp_path):
    repository(tmp_path, brain("knn", 0.1))
    repository(tmp_path, brain("knn", 0.65), profile="full")
    assert row(tmp_path, "ra.t1.brain_growth.knn.sad")["obtained_on"].endswith("profile full")


@pytest.mark.parametrize("factor, verdict", [(1.0, "partly"), (0.81, "partly"), (1.19, "partly"), (0.79, "not attempted"), (3, "not attempted")])
def test_a_reduced_profile_supports_but_never_contradicts(tmp_path, factor, verdict):
    repository(tmp_path, brain("ours", 9, n=10))
    repository(tmp_path, brain("ours", 0.4032 * factor), profile="reduced")
    found = row(tmp_path, "ra.t1.brain_growth.ours.sad")
    assert found["verdict"] == verdict and "reduced widths" in found["why"] and found["obtained_on"].endswith("profile reduced")


def test_an_ordering_with_a_reduced_profile_is_at_most_partly_confirmed(tmp_path):
    ordering = next(c for c in claims.read_claims(REPOSITORY) if c.id == "ra.t1.brain_growth.sad.best")
    others = "".join(brain(name.split(".")[3], 0.9) for name in ordering.measures[1:])
    repository(tmp_path, brain("ours", 0.4) + others, profile="reduced")
    assert row(tmp_path, ordering.id)["verdict"] == "partly" and "reduced widths" in row(tmp_path, ordering.id)["why"]
    repository(tmp_path, brain("ours", 0.95) + others, profile="reduced")
    assert row(tmp_path, ordering.id)["verdict"] == "not attempted"


@pytest.mark.parametrize("measures, claimed, words", [
    (brain("knn", "nan"), (), "finite value"), (brain("knn", "0,5"), (), "columns measure"), (brain("knn", "half"), (), "finite value"), (brain("knn", 1, n=0), (), "finite"),
    (2 * brain("knn", 1), (), "two values"),
    (brain("odd", 1), ("ra.t1.brain_growth.odd.sad",), "ids of the ledger"), ("", (), "columns"),
])
def test_wrong_measures_are_refused(tmp_path, measures, claimed, words):
    with pytest.raises(InputError, match=words) as told:
        claims.ledger(repository(tmp_path, measures, claimed))
    assert "\n" not in str(told.value)


def test_a_claim_that_an_older_run_did_not_measure_is_not_attempted(tmp_path):
    repository(tmp_path, brain("knn", 1), ("ra.t1.brain_growth.ours.sad",))
    assert row(tmp_path, "ra.t1.brain_growth.ours.sad")["verdict"] == "not attempted"


def test_a_measure_comes_from_one_item(tmp_path):
    repository(tmp_path, brain("knn", 1))
    repository(tmp_path, brain("knn", 1), name="another")
    with pytest.raises(InputError, match="which is also in figures/quick/item/measures.csv"):
        claims.ledger(tmp_path)


def test_the_ledger_is_written_the_same_way_twice(tmp_path):
    repository(tmp_path, brain("knn", 0.6))
    claims.update_claims(tmp_path)
    first, when = (tmp_path / "claims.csv").read_bytes(), (tmp_path / "claims.csv").stat().st_mtime_ns
    claims.update_claims(tmp_path)
    assert (tmp_path / "claims.csv").read_bytes() == first and (tmp_path / "claims.csv").stat().st_mtime_ns == when
    assert b"\r" not in first


# Pages

def published(root, profile="quick"):
    "Complete the item's folder with a table and records."
    folder = root / "figures" / profile / "item"
    (folder / "table.csv").write_text("method,sad_mean\nclosed_form,0.1\n*|<b>,0.2\n")
    for name in ("table.csv", "measures.csv"):
        record = json.loads(next(REPOSITORY.glob("figures/quick/*/*.provenance.json")).read_text())
        about = next(iter(record["outputs"].values()))
        record |= {"file": name, "caption": "Some *values*", "outputs": {name: about}}
        provenance_path(folder / name).write_text(json.dumps(record))
    return root


def test_pages_show_results_with_their_provenance(tmp_path):
    root = published(repository(tmp_path / "root", brain("knn", 0.6)))
    results, ledger = report.write_pages(tmp_path / "site", root)
    text = results.read_text()
    assert "| closed\\_form | 0.1 |" in text and "| \\*\\|\\<b\\> | 0.2 |" in text
    assert "<summary>Provenance of table.csv</summary>" in text and "Profile: quick" in text
    assert "medmatting reproduce" in text and str(tmp_path) not in text
    assert (tmp_path / "site/results/item/table.csv").exists()
    assert "Table 1, KNN, Brain-growth SAD | 0.6534 | 0.6000" in ledger.read_text()


def test_a_moving_picture_is_shown_with_its_words_and_can_be_put_away(tmp_path):
    root = published(repository(tmp_path, brain("knn", 0.6)))
    folder, manifest = root / "figures/quick/item", json.loads((root / MANIFEST).read_text())
    record = provenance_path(folder / "table.csv").read_text().replace("table.csv", "turn.webp")
    manifest["items"][0]["outputs"]["turn.webp"] = {"caption": "A turn."}
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="alt"):
        report.results_page(root)
    manifest["items"][0]["outputs"]["turn.webp"]["alt"] = "A nodule turns."
    (root / MANIFEST).write_text(json.dumps(manifest))
    provenance_path(folder / "turn.webp").write_text(record)
    (folder / "turn.webp").write_bytes(b"RIFF")
    text = report.write_pages(tmp_path / "site", root)[0].read_text()
    assert re.search(r'<details open>\n<summary>Moving.*</summary>\n\n!\[.*\]\(item/turn.webp\)\{fig-alt="A nodule turns."\}\n\n</details>', text)
    assert (tmp_path / "site/results/item/turn.webp").read_bytes() == b"RIFF"


def test_the_profile_nearest_to_the_paper_is_shown_and_a_quick_one_named_for_what_it_is(tmp_path):
    root = published(repository(tmp_path, brain("knn", 0.6)))
    assert "proves that the path works" not in report.results_page(root)
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["items"][0]["parameters"]["reduced"] = {}
    manifest["items"][0]["resources"]["minutes"]["reduced"] = 100
    (root / MANIFEST).write_text(json.dumps(manifest))
    assert "**These are results of the quick profile." in report.results_page(root)
    shutil.copytree(root / "figures/quick", root / "figures/reduced")
    text = report.results_page(published(root, "reduced"))
    assert "Results of the reduced profile" in text and "which only proves that the path works" in text


def test_pages_say_what_has_not_been_run(tmp_path):
    text = report.results_page(repository(tmp_path))
    assert "Not run yet" in text and "medmatting data fetch brain_growth" in text


def test_every_claim_is_on_the_page():
    found = claims.ledger(REPOSITORY)
    page = report.claims_page(found)
    assert all(report.plain(line["statement"]) in page and line["printed"] in page for line in found)
    decided = sum(line["verdict"] != "not attempted" for line in found)
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| claim", "| ---", "| verdict"))]
    assert len(rows) == len(found) + decided + len(claims.VERDICTS)
