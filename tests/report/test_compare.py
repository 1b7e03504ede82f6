"""Comparison of two runs: settings, paired differences, the page and the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from afmrl_ray import storage
from afmrl_ray.commands.report import main
from afmrl_ray.errors import StorageError
from afmrl_ray.report import compare, comparison_text, write_comparison
from afmrl_ray.report.compare import Comparison
from afmrl_ray.report.compare_tables import comparison_notes, comparison_tables
from afmrl_ray.runs import RunDirectory, StageOutcome
from tests.report.fake_run import FakeRun
from tests.report.page import Element, read_page
from tests.report.test_write import ADDRESS

ROWS = np.arange(40)
HITS = np.random.default_rng(0).random(40)


def measured(
    folder: Path,
    values: np.ndarray,
    *,
    name: str = "left",
    rows: np.ndarray = ROWS,
    steps: int = 10,
    catalogue: str = "f" * 64,
    others: Sequence[str] = (),
    by_query: bool = True,
    protocols: Sequence[Mapping[str, Any]] = (),
    asked: Mapping[str, Any] | None = None,
) -> RunDirectory:
    """A run with a baseline that was measured by query.

    Args:
        others: names of further protocols, which measure the same.
        by_query: whether the numbers by query are kept.
        protocols: as the run's config has them.
        asked: the config among the inputs of the evaluation.
    """
    run = RunDirectory(str(folder), name)
    run.create()
    evaluation = {"primary_protocol": "fine", "protocols": list(protocols)}
    config = {"run": {"name": name, "seed": 0}, "agcl": {"steps": steps}, "evaluation": evaluation}
    run.write_run(
        {"name": name, "config": config, "versions": {"ray": "2.60.0"}, "catalogue": {"fingerprint": catalogue}}
    )

    def body(directory: str) -> StageOutcome:
        names = ["fine", *others]
        columns = {f"{each}/{key}": of for each in names for key, of in (("rows", rows), ("hit@1", values))}
        storage.write_bytes(storage.join(directory, "q.safetensors"), save(columns))
        mean = float(values.mean())
        metrics = {"hit@1": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}, "nmi": {"mean": 0.5}}
        protocol = {"kind": "retrieval", "queries": len(rows), "gallery": 9, "metrics": metrics}
        outputs = {"per_query": "q.safetensors"} if by_query else {}
        return StageOutcome(outputs, {"protocols": dict.fromkeys(names, protocol)})

    run.run_stage("evaluate-baseline", {"config": asked or {}, "upstream": {}}, body)
    return run


def notes(comparison: Comparison) -> list[str]:
    return [f"{label}: {reason}." for label, reason in comparison_notes(comparison)]


def page_of(comparison: Comparison, folder: Path) -> Element:
    write_comparison(comparison, str(folder / "page.html"))
    return read_page((folder / "page.html").read_text("utf-8"))


def notes_of_page(comparison: Comparison, folder: Path) -> list[str]:
    return [note.text for note in page_of(comparison, folder).all("p", kind="notice")]


def differences(left: RunDirectory, right: RunDirectory) -> dict[str, Any]:
    return {each.metric: each.change for each in compare(left, right).differences}


def test_a_difference_is_paired_by_query(tmp_path: Path) -> None:
    left, right = measured(tmp_path, HITS), measured(tmp_path, HITS + 0.125, name="right", steps=20)
    found = differences(left, right)
    # Every query gains the same, so no resample can change it, however far the queries lie apart.
    assert found["hit@1"].mean == pytest.approx(0.125)
    assert (found["hit@1"].low, found["hit@1"].high) == pytest.approx((0.125, 0.125))
    assert found["nmi"].mean == 0.0
    assert not found["nmi"].has_interval
    assert differences(right, left)["hit@1"].mean == pytest.approx(-0.125)


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    found = compare(measured(tmp_path, HITS), measured(tmp_path, HITS, name="right", steps=20))
    assert [(each.name, each.left, each.right) for each in found.settings] == [
        ("agcl.steps", "10", "20"),
        ("run.name", "left", "right"),
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": ROWS + 1}, "the runs do not answer the same queries of fine"),
        ({"catalogue": "0"}, "the runs are of different catalogues"),
        ({"by_query": False}, "right kept no numbers by query of fine"),
        ({"protocols": [{"name": "fine", "with_attributes": "query"}]}, "the runs differ in the settings of fine"),
    ],
)
def test_unpaired_differences_have_no_interval_and_a_reason(tmp_path: Path, change: Any, why: str) -> None:
    same = [{"name": "fine", "with_attributes": "both"}]
    left = measured(tmp_path, HITS, protocols=same)
    found = compare(left, measured(tmp_path, HITS + 0.1, name="right", **{"protocols": same, **change}))
    assert found.differences[0].change.mean == pytest.approx(0.1)
    assert not found.differences[0].change.has_interval
    assert found.unpaired == why
    assert [reason for _, reason in comparison_notes(found)] == [why]
    assert notes_of_page(found, tmp_path) == notes(found)
    assert comparison_text(found).splitlines()[-1] == notes(found)[0]


def test_only_the_protocol_that_is_configured_otherwise_is_not_paired(tmp_path: Path) -> None:
    fine, coarse = {"name": "fine", "label": "product_id"}, {"name": "coarse", "label": "category"}
    other = {"name": "coarse", "label": "brand"}
    left = measured(tmp_path, HITS, others=["coarse"], protocols=[fine, coarse])
    right = measured(tmp_path, HITS, others=["coarse"], name="right", protocols=[fine, other])
    found = compare(left, right)
    paired = {each.protocol: each.change.has_interval for each in found.differences if each.metric == "hit@1"}
    assert paired == {"fine": True, "coarse": False}
    assert found.unpaired == "the runs differ in the settings of coarse"


def test_settings_of_a_protocol_are_those_that_it_was_measured_with(tmp_path: Path) -> None:
    then, now = ({"evaluation": {"protocols": [{"name": "fine", "label": label}]}} for label in ("brand", "product_id"))
    protocols = now["evaluation"]["protocols"]
    left = measured(tmp_path, HITS, protocols=protocols, asked=then)
    right = measured(tmp_path, HITS, name="right", protocols=protocols, asked=now)
    assert compare(left, right).unpaired == "the runs differ in the settings of fine"
    again = measured(tmp_path, HITS, name="again", protocols=protocols, asked=then)
    assert compare(left, again).unpaired == ""


def test_protocols_that_only_one_run_has_are_named(tmp_path: Path) -> None:
    left = measured(tmp_path, HITS, others=["coarse", "labels"])
    right = measured(tmp_path, HITS, name="right", others=["labels", "<b>"])
    found = compare(left, right)
    assert found.uncompared == "left alone measures coarse; right alone measures <b>"
    assert [reason for _, reason in comparison_notes(found)] == [found.uncompared]
    assert notes_of_page(found, tmp_path) == notes(found)
    assert comparison_notes(compare(left, measured(tmp_path, HITS, others=["coarse", "labels"]))) == []


def test_sections_in_lists_are_compared_setting_by_setting(tmp_path: Path) -> None:
    protocols = [{"name": "fine", "ks": [1, 5]}, {"name": "coarse", "query": {"split": ["test"]}, "map_k": 10}]
    other = [{"name": "coarse", "query": {"split": ["val", "test"]}, "map_k": 10}, {"name": "fine", "ks": [1, 10]}]
    found = compare(
        measured(tmp_path, HITS, protocols=protocols), measured(tmp_path, HITS, name="right", protocols=other)
    )
    assert [(each.name, each.left, each.right) for each in found.settings] == [
        ("evaluation.protocols.fine.ks", "[1, 5]", "[1, 10]"),
        ("evaluation.protocols.coarse.query.split", "['test']", "['val', 'test']"),
        ("run.name", "left", "right"),
    ]


def test_sections_without_unique_names_are_compared_by_index(tmp_path: Path) -> None:
    left, right = measured(tmp_path, HITS), measured(tmp_path, HITS, name="left-2")
    for run, changed in ((left, "both"), (right, "text")):
        record = run.read_run()
        agcl = {
            "pairs": [{"query": "image"}, {"query": changed}],
            "twice": [{"name": "a", "x": 1}, {"name": "a", "x": changed}],
        }
        run.write_run({**record, "config": {"agcl": agcl}})
    assert [(each.name, each.left, each.right) for each in compare(left, right).settings] == [
        ("agcl.pairs.1.query", "both", "text"),
        ("agcl.twice.1.x", "both", "text"),
    ]


def test_runs_without_a_common_metric_are_refused(tmp_path: Path) -> None:
    empty = RunDirectory(str(tmp_path), "empty")
    empty.create()
    empty.write_run({"name": "empty"})
    with pytest.raises(StorageError, match="no stage measures the same"):
        compare(measured(tmp_path, HITS), empty)


def test_the_page_shows_every_table_and_is_self_contained(tmp_path: Path) -> None:
    left = FakeRun(str(tmp_path / "a")).everything()
    right = measured(tmp_path, HITS, name="<img src=x onerror=alert(1)>")
    whole = compare(left, FakeRun(str(tmp_path / "b")).everything())
    assert {each.variant for each in whole.differences} == {"baseline", "round 0", "round 1"}
    for comparison in (whole, compare(left, right)):
        page = page_of(comparison, tmp_path)
        images = page.all("img")
        assert len(images) == 3
        assert all(image.attributes["src"].startswith("data:image/png") for image in images)
        assert not ADDRESS.search(page.all("style")[0].text)
        assert not [each for each in page.all() if each.tag in ("script", "link", "iframe")]
        for table in comparison_tables(comparison):
            assert page.table(table.title) == [table.columns, *[[cell or "–" for cell in row] for row in table.rows]]


def test_tables_have_a_row_per_metric_with_both_means_and_the_difference(tmp_path: Path) -> None:
    left, right = measured(tmp_path, HITS), measured(tmp_path, HITS + 0.125, name="right", steps=20)
    tables = {table.title: table for table in comparison_tables(compare(left, right))}
    metrics = tables["Metrics, baseline"]
    assert metrics.columns[1:3] == ["left", "right"]
    means = [100 * HITS.mean(), 100 * (HITS + 0.125).mean()]
    assert metrics.rows == [
        ["fine: hit@1 %", *(f"{mean:.1f} ± 10.0" for mean in means), "+12.5 [+12.5, +12.5]"],
        ["fine: NMI %", "50.0", "50.0", "+0.0"],
    ]
    assert tables["Settings that differ"].rows == [["agcl.steps", "10", "20"], ["run.name", "left", "right"]]
    assert [row[0] for row in tables["Stages, seconds"].rows] == ["evaluate-baseline", "all"]


def test_attributes_and_rewards_are_compared_by_round(tmp_path: Path) -> None:
    left, right = FakeRun(str(tmp_path / "a")), FakeRun(str(tmp_path / "b"))
    tables = {table.title: table for table in comparison_tables(compare(left.everything(), right.everything()))}
    attributes = {row[0]: row[1:] for row in tables["Attributes of an item"].rows}
    assert attributes["round 0: words"] == ["7.3", "7.3"]
    assert attributes["round 1: invalid %"] == ["2.1", "2.1"]
    rewards = [row[1:] for row in tables["RAR"].rows]
    assert rewards == [["+5.1 [+3.8, +6.5]"] * 2] * 2


def test_the_job_writes_the_page_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = measured(tmp_path, HITS), measured(tmp_path, HITS + 0.125, name="right")
    assert main(["--compare", left.path, right.path + "/"]) == 0
    assert comparison_text(compare(left, right)) in capsys.readouterr().out
    assert (tmp_path / "right" / "report" / "compare-left.html").exists()
    assert main(["--run", left.path]) == 0
    assert (tmp_path / "left" / "report" / "index.html").exists()


def test_the_job_names_the_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = measured(tmp_path, HITS)
    assert main(["--compare", left.path, str(tmp_path / "none")]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert str(tmp_path / "none") in errors[-1]
    assert errors[-1].startswith("error: ")
