"""The tables of a run hold the numbers of the stage records, each in its row and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from afmrl_ray.report import run_table
from afmrl_ray.report.collect import collect
from afmrl_ray.report.labels import metric_label, metric_order
from afmrl_ray.report.summary import RunSummary
from afmrl_ray.report.table import column_names, sections, stage_table, text_notes, text_tables
from afmrl_ray.runs import RunDirectory
from tests.report.fake_run import FakeRun

Rows = dict[str, dict[str, list[str]]]
"""Texts of a row's cells, by section and label of the row."""


def cells(summary: RunSummary) -> Rows:
    return {
        section.title: {row.label: [cell.text for cell in row.cells] for row in section.rows}
        for section in sections(summary)
    }


def intervals(summary: RunSummary) -> Rows:
    """Intervals of the rows whose intervals the text tables show."""
    return {
        section.title: {row.label: [cell.interval for cell in row.cells] for row in section.rows if row.intervals}
        for section in sections(summary)
    }


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return FakeRun(str(tmp_path_factory.mktemp("runs"))).everything()


def test_every_cell_is_the_number_of_its_stage(whole: RunDirectory) -> None:
    summary = collect(whole)
    assert column_names(summary) == ["chance", "pixels", "baseline", "round 0", "round 1"]
    found, between = cells(summary), intervals(summary)
    metrics = {stage.name: stage.metrics for stage in whole.stages()}
    columns = [
        metrics["baselines"]["chance"],
        metrics["baselines"]["pixels"],
        *(metrics[f"evaluate-{name}"]["protocols"] for name in ("baseline", "r0", "r1")),
    ]
    for protocol in ("fine", "coarse", "labels"):
        names = {name for column in columns for name in column.get(protocol, {}).get("metrics", {})}
        assert found[protocol] == {
            f"{metric_label(name)} %": [
                percent(column[protocol]["metrics"][name]["mean"])
                if name in column.get(protocol, {}).get("metrics", {})
                else ""
                for column in columns
            ]
            for name in names
        }
    hit = [column["fine"]["metrics"]["hit@1"] for column in columns[1:]]
    assert between["fine"] == {"hit@1 %": ["", *(f"{percent(h['low'])} to {percent(h['high'])}" for h in hit)]}
    sizes = [[metrics[f"attributes-r{r}"], metrics[f"evaluate-r{r}"]["attributes"]] for r in (0, 1)]
    assert found["attributes"]["words"][3:] == [f"{a['mean_words']:.1f} -> {b['mean_words']:.1f}" for a, b in sizes]
    assert found["attributes"]["pairs"][3:] == [f"{a['mean_pairs']:.1f} -> {b['mean_pairs']:.1f}" for a, b in sizes]
    assert found["attributes"]["invalid %"][3:] == [
        f"{percent(a['invalid_fraction'])} -> {percent(b['invalid_fraction'])}" for a, b in sizes
    ]
    for name, label in (("precision", "precision %"), ("recall", "recall %"), ("f1", "F1 %")):
        pairs = [[percent(each["quality"][name]) for each in both] for both in sizes]
        assert found["attributes"][label][3:] == [f"{a} -> {b}" for a, b in pairs]
    assert list(found["attribute names"]) == ["color", "size"], "the most frequent name is not first"
    assert found["attribute names"]["size"][3:] == ["53 -> 43", "43 -> 33"]
    gain = "gain in hit@1 of fine, points"
    assert found["promotion"]["promoted"][3:] == ["yes", "no"]
    assert found["promotion"][gain] == [""] * 4 + ["+6.0"]
    assert between["promotion"] == {gain: [""] * 4 + ["+4.9 to +7.2"]}
    (promotion,) = [section for section in sections(summary) if section.title == "promotion"]
    assert promotion.note == "; ".join(metrics["promotion-r1"]["why"])
    rar = [metrics[f"rar-r{r}"] for r in (0, 1)]
    for when in ("before", "after"):
        values = [each[f"eval/reward_{when}"] for each in rar]
        row = f"held-out, {when} RAR"
        assert found["reward"][row] == [""] * 3 + [f"{v['mean']:.3f}" for v in values]
        assert between["reward"][row] == [""] * 3 + [f"{v['low']:.3f} to {v['high']:.3f}" for v in values]
    assert found["reward"]["held-out gain"][3:] == [f"{each['eval/reward_gain']['mean']:+.3f}" for each in rar]
    assert found["reward"]["training, last steps"][3:] == [f"{each['reward/mean']:.3f}" for each in rar]
    stages = stage_table(summary).rows
    assert stages[:-1] == [[s.name, f"{s.seconds:.1f}", f"{s.peak_memory_mb:.0f}"] for s in whole.stages()]
    assert stages[-1][:2] == ["all", f"{sum(s.seconds for s in whole.stages()):.1f}"]


def test_the_primary_protocol_is_the_first_section(whole: RunDirectory) -> None:
    assert list(cells(collect(whole))) == [
        *("fine", "coarse", "labels", "attributes", "attribute names", "reward", "promotion")
    ]


def test_the_text_is_ascii_and_holds_the_cells_of_every_row_in_order(whole: RunDirectory) -> None:
    text = run_table(whole)
    assert text.isascii()
    blocks = text.split("\n\n")
    tables = text_tables(collect(whole))
    assert len(blocks) == len(tables)
    for block, table in zip(blocks, tables, strict=True):
        title, header, *rows = block.splitlines()
        assert title == table.title
        assert header.split() == " ".join(table.columns).split()
        assert [row.split() for row in rows] == [" ".join(cells).split() for cells in table.rows]
        ends = {len(row) for row, cells in zip([header, *rows], [table.columns, *table.rows], strict=True) if cells[-1]}
        assert len(ends) == 1, "the last column is not aligned to the right"


def test_rows_with_intervals_are_followed_by_them(whole: RunDirectory) -> None:
    table = text_tables(collect(whole))[0]
    first, second = table.rows[:2]
    shown = cells(collect(whole))["fine"]["hit@1 %"], intervals(collect(whole))["fine"]["hit@1 %"]
    assert (first[1:], second[1:]) == shown


def test_metrics_are_ordered_by_kind_then_depth() -> None:
    names = ["purity", "recall@10", "hit@10", "mrr", "hit@5", "map_m5@10", "map@10", "recall@5", "custom", "nmi"]
    assert sorted(names, key=metric_order) == [
        *("hit@5", "hit@10", "recall@5", "recall@10", "map@10", "map_m5@10", "mrr", "nmi", "purity", "custom")
    ]
    assert metric_label("map_m5@10") == "mAP@10 (M5)"


def test_missing_stages_leave_empty_cells(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    assert text_tables(collect(fake.run))[-1].rows == [["all", "0.0", "-"]]
    assert len(run_table(fake.run).splitlines()) == 1
    fake.stage("catalogue", {})
    assert cells(collect(fake.run)) == {}
    assert [row[0] for row in stage_table(collect(fake.run)).rows] == ["catalogue", "all"]
    fake.stage("agcl-r0", {"train/loss": 2.0})
    fake.stage("rar-r0", {"reward/mean": 0.1234})
    assert cells(collect(fake.run)) == {"reward": {"training, last steps": ["0.123"]}}
    fake.stage("evaluate-r2", {"protocols": fake.protocols(0.3)})
    fake.stage("agcl-r2", {"train/loss": 1.0})
    assert column_names(collect(fake.run)) == ["round 0", "round 2"]


def test_stale_columns_and_stages_are_marked(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    run = fake.everything(rounds=1)
    assert text_notes(collect(run)) == []
    assert "*" not in run_table(run)
    fake.stage("attributes-r0", fake.sizes(4.0), "distill")
    summary = collect(run)
    assert column_names(summary) == ["chance", "pixels", "baseline", "round 0*"]
    marked = {row[0] for row in stage_table(summary).rows if row[0].endswith("*")}
    assert marked == {f"{name}*" for name in summary.stale}
    assert "rar-r0*" in marked
    (note,) = text_notes(summary)
    assert run_table(run).splitlines()[-1] == note


def test_the_gain_of_a_promotion_is_labelled_with_the_selection_protocol(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    run = fake.everything()
    config = {**run.read_run()["config"], "cit": {"selection_protocol": "coarse"}}
    run.write_run({**run.read_run(), "config": config})
    assert cells(collect(run))["promotion"]["gain in hit@1 of coarse, points"][-1] == "+6.0"
