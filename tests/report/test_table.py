"""The terminal tables hold the numbers of the stage records, each in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from afmrl_ray.cit.stages import RunDirectory
from afmrl_ray.report import run_table
from afmrl_ray.report.table import metric_label, metric_order
from tests.report.fake_run import FakeRun


def cells(text: str) -> dict[str, dict[str, list[str]]]:
    """Rows by section, cut where two spaces stand; a section begins at a line that is not indented."""
    found: dict[str, dict[str, list[str]]] = {}
    section = last = ""
    for line in text.splitlines():
        if line.startswith("  "):
            label, *values = [part.strip() for part in line.strip().split("  ") if part.strip()]
            name = f"{last} interval" if label == "95 % interval" else label
            last = label
            found[section][name] = values
        elif line:
            section = line.split(" (")[0]
            found.setdefault(section, {})
    return found


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return FakeRun(str(tmp_path_factory.mktemp("runs"))).everything()


def test_every_cell_is_the_number_of_its_stage(whole: RunDirectory) -> None:
    text = run_table(whole)
    first, second = text.split("\n\n")
    head, rungs = first.splitlines()[0].split(), first.split("\n", 1)[1]
    assert head == ["chance", "pixels", "baseline", "round", "0", "round", "1"]
    found = cells(rungs)
    metrics = {stage.name: stage.metrics for stage in whole.stages()}
    columns = [
        metrics["floor"]["chance"],
        metrics["floor"]["pixels"],
        *(metrics[f"evaluate-{name}"]["protocols"] for name in ("baseline", "r0", "r1")),
    ]
    for protocol in ("fine", "coarse", "labels"):
        names = {name for column in columns for name in column.get(protocol, {}).get("metrics", {})}
        expected = {
            f"{metric_label(name)} %": [
                percent(column[protocol]["metrics"][name]["mean"])
                if name in column.get(protocol, {}).get("metrics", {})
                else "-"
                for column in columns
            ]
            for name in names
        }
        shown = {label: row for label, row in found[protocol].items() if not label.endswith("interval")}
        assert shown == expected
    hit = [column["fine"]["metrics"]["hit@1"] for column in columns[1:]]
    assert found["fine"]["hit@1 % interval"] == [f"{percent(h['low'])} to {percent(h['high'])}" for h in hit]
    sizes = [[metrics[f"attributes-r{r}"], metrics[f"evaluate-r{r}"]["attributes"]] for r in (0, 1)]
    assert found["attributes"]["words"][3:] == [f"{a['mean_words']:.1f} -> {b['mean_words']:.1f}" for a, b in sizes]
    assert found["attributes"]["pairs"][3:] == [f"{a['mean_pairs']:.1f} -> {b['mean_pairs']:.1f}" for a, b in sizes]
    assert found["attributes"]["invalid %"][3:] == [
        f"{percent(a['invalid_fraction'])} -> {percent(b['invalid_fraction'])}" for a, b in sizes
    ]
    for name, label in (("precision", "precision %"), ("recall", "recall %"), ("f1", "F1 %")):
        pairs = [[percent(each["quality"][name]) for each in both] for both in sizes]
        assert found["attributes"][label][3:] == [f"{a} -> {b}" for a, b in pairs]
    assert list(found["attribute names"]) == ["color", "size"], "the name written most often stands first"
    assert found["attribute names"]["size"][3:] == ["53 -> 43", "43 -> 33"]
    assert found["promotion"]["promoted"][3:] == ["yes", "no"]
    assert found["promotion"]["gain in hit@1 of fine, points"] == ["-"] * 4 + ["+6.0"]
    assert found["promotion"]["gain in hit@1 of fine, points interval"] == ["+4.9 to +7.2"]
    assert "labels changes by -0.0310" in text
    rar = [metrics[f"rar-r{r}"] for r in (0, 1)]
    for when in ("before", "after"):
        values = [each[f"heldout_{when}"] for each in rar]
        row = f"held-out, {when} RAR"
        assert found["reward"][row] == ["-"] * 3 + [f"{v['mean']:.3f}" for v in values]
        assert found["reward"][f"{row} interval"] == [f"{v['low']:.3f} to {v['high']:.3f}" for v in values]
    assert found["reward"]["held-out gain"][3:] == [f"{each['heldout_gain']['mean']:+.3f}" for each in rar]
    assert found["reward"]["training, last steps"][3:] == [f"{each['reward_mean']:.3f}" for each in rar]
    stages = [line.split() for line in second.splitlines()[1:]]
    assert stages[:-1] == [[s.name, f"{s.seconds:.1f}", f"{s.peak_memory_mb:.0f}"] for s in whole.stages()]
    assert stages[-1][1] == f"{sum(s.seconds for s in whole.stages()):.1f}"


def test_the_headline_stands_first_and_text_is_ascii(whole: RunDirectory) -> None:
    text = run_table(whole)
    assert text.isascii()
    assert list(cells(text.split("\n\n")[0].split("\n", 1)[1])) == [
        *("fine", "coarse", "labels", "attributes", "attribute names", "reward", "promotion")
    ]


def test_metrics_are_ordered_by_kind_then_depth() -> None:
    names = ["purity", "recall@10", "hit@10", "mrr", "hit@5", "map_m5@10", "map@10", "recall@5", "custom", "nmi"]
    assert sorted(names, key=metric_order) == [
        *("hit@5", "hit@10", "recall@5", "recall@10", "map@10", "map_m5@10", "mrr", "nmi", "purity", "custom")
    ]
    assert metric_label("map_m5@10") == "mAP@10 (M5)"


def test_missing_stages_leave_gaps_not_errors(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    assert run_table(fake.run) == "fake: no stage is committed yet"
    fake.stage("catalogue", {})
    assert run_table(fake.run).splitlines()[1].startswith("catalogue")
    fake.stage("agcl-r0", {"train/loss": 2.0})
    fake.stage("rar-r0", {"reward_mean": 0.1234})
    text = run_table(fake.run)
    assert cells(text.split("\n\n")[0].split("\n", 1)[1]) == {"reward": {"training, last steps": ["0.123"]}}
    fake.stage("evaluate-r2", {"protocols": fake.protocols(0.3)})
    fake.stage("agcl-r2", {"train/loss": 1.0})
    assert run_table(fake.run).splitlines()[0].split() == ["round", "0", "round", "2"]


def test_outdated_columns_and_stages_are_marked(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    run = fake.everything(rounds=1)
    assert "*" not in run_table(run)
    fake.stage("attributes-r0", fake.sizes(4.0), "distill")
    text = run_table(run)
    assert "round 0*" in text
    assert "baseline*" not in text
    assert "\nrar-r0*" in text
    assert "* made with other settings" in text


def test_a_promotion_names_the_protocol_that_decided_it(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    run = fake.everything()
    config = {**run.read_run()["config"], "cit": {"selection_protocol": "coarse"}}
    run.write_run({**run.read_run(), "config": config})
    promotion = cells(run_table(run).split("\n\n")[0].split("\n", 1)[1])["promotion"]
    assert promotion["gain in hit@1 of coarse, points"][-1] == "+6.0"
