"""The written report: files, page and numbers."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from afmrl_ray import storage
from afmrl_ray.report import write_report
from afmrl_ray.report.collect import collect
from afmrl_ray.report.drawing import DARK, LIGHT, Panel, draw_png
from afmrl_ray.report.format import format_duration
from afmrl_ray.report.html import render
from afmrl_ray.report.key_figures import key_figures
from afmrl_ray.report.plots import plot_panels
from afmrl_ray.report.summary import RunSummary
from afmrl_ray.report.table import column_names, sections, stage_table
from afmrl_ray.report.write import report_record
from tests.report.fake_run import FakeItems, FakeRun
from tests.report.page import Element, read_page

HOSTILE_TITLE = "<script>alert('title')</script> \"onload=alert(1)"
HOSTILE_ATTRIBUTES = "color: </dd><img src=x onerror=alert(2)>"
ADDRESS = re.compile(r"(?:https?:)?//|url\(|@import", re.IGNORECASE)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    fake = FakeRun(str(tmp_path_factory.mktemp("runs")), title=HOSTILE_TITLE, attributes=HOSTILE_ATTRIBUTES)
    run = fake.everything()
    index = Path(write_report(run, items=FakeItems()))
    return {"run": run, "folder": index.parent, "page": read_page(index.read_text("utf-8")), "index": index}


def test_the_report_lies_below_the_run(report: dict[str, Any]) -> None:
    assert report["index"] == Path(report["run"].path) / "report" / "index.html"
    assert {path.name for path in report["folder"].iterdir()} == {
        *("index.html", "report.json", "metrics.png", "rar.png", "agcl.png", "stages.png")
    }


def test_plots_are_images_of_something(report: dict[str, Any]) -> None:
    for path in report["folder"].glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 250
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        coloured = (np.ptp(pixels.astype(int), axis=1) > 60).mean()
        assert coloured > 0.002, f"{path.name} shows no data"


def lines(panel: Panel) -> dict[str, np.ndarray]:
    """[N, 2] points of the labelled lines of a panel."""
    axes = Figure().subplots()
    panel.draw(axes, LIGHT)
    found = {str(line.get_label()): line.get_xydata() for line in axes.lines}
    return {label: points for label, points in found.items() if not label.startswith("_")}


def test_there_is_a_panel_per_logged_key_with_a_line_per_round(report: dict[str, Any]) -> None:
    summary = collect(report["run"])
    panels = plot_panels(summary)
    first = summary.rounds[0]
    names = [key for key in first.rar_log[0] if key.startswith("rollout/name_fraction/")]
    others = [key for key in first.rar_log[0] if key not in ("step", *names)]
    # One panel for the attribute names of each round, one for every other key with both rounds.
    assert len(panels["rar"]) == len(others) + 2
    assert [set(lines(panel)) for panel in panels["rar"][: len(others)]] == [{"round 0", "round 1"}] * len(others)
    assert all(len(lines(panel)) == len(names) for panel in panels["rar"][len(others) :])
    assert set(lines(panels["agcl"][0])) == {"distillation"}
    assert {"baseline", "round 0", "round 1"} in [set(lines(panel)) for panel in panels["agcl"]]


def test_metric_panels_show_the_means_of_the_variants(report: dict[str, Any]) -> None:
    summary = collect(report["run"])
    axes = Figure().subplots()
    plot_panels(summary)["metrics"][0].draw(axes, LIGHT)
    trained = [variant for variant in summary.variants if variant.trained]
    assert [label.get_text() for label in axes.get_xticklabels()] == [variant.name for variant in trained]
    means = [[100 * (v.protocols["fine"].metrics[f"hit@{k}"].mean or 0.0) for v in trained] for k in (1, 5, 10)]
    drawn = [container.lines[0].get_ydata().tolist() for container in axes.containers]
    assert drawn == [pytest.approx(each) for each in means]


def test_dark_charts_are_dark(report: dict[str, Any]) -> None:
    panels = plot_panels(collect(report["run"]))["rar"][:1]
    images = [Image.open(io.BytesIO(draw_png(panels, theme))) for theme in (LIGHT, DARK)]
    light, dark = (float(np.median(np.asarray(image.convert("L")))) for image in images)
    assert light > 240
    assert dark < 60


def test_the_page_is_self_contained(report: dict[str, Any]) -> None:
    page: Element = report["page"]
    (style,) = page.all("style")
    assert not ADDRESS.search(style.text)
    for element in page.all():
        assert element.tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name, value in element.attributes.items():
            if name in {"src", "srcset", "href", "action", "poster", "background"}:
                assert value.startswith("data:image/"), f"{element.tag} {name}={value[:60]}"
            else:
                assert not ADDRESS.search(value), f"{element.tag} {name}={value}"
                assert not name.startswith("on")
    images = page.all("img")
    assert all(image.attributes["alt"] for image in images)
    assert sum(image.attributes["src"].startswith("data:image/jpeg") for image in images) == 3 * 6


def test_every_chart_has_a_light_and_a_dark_image(report: dict[str, Any]) -> None:
    page: Element = report["page"]
    panels = plot_panels(collect(report["run"]))
    for name in panels:
        section = page.section(name if name == "stages" else f"plot-{name}")
        pictures = section.all("picture")
        assert len(pictures) == len(panels[name])
        for picture in pictures:
            (source,), (image,) = picture.all("source"), picture.all("img")
            assert source.attributes["srcset"] != image.attributes["src"]


def test_hostile_titles_and_attributes_stay_text(report: dict[str, Any]) -> None:
    page: Element = report["page"]
    assert page.all("script") == []
    assert all(image.attributes["src"] != "x" for image in page.all("img"))
    first = page.section("examples").all("article")[0]
    assert HOSTILE_TITLE in first.text
    assert HOSTILE_ATTRIBUTES in [pair.text for pair in first.all("span", kind="pair")]


def test_hits_are_marked_by_more_than_colour(report: dict[str, Any]) -> None:
    hits = [item for hits in report["page"].section("examples").all("ol", kind="hits") for item in hits.all("li")]
    right = [hit for hit in hits if hit.attributes.get("class") == "right"]
    assert (len(right), len(hits)) == (3, 15)
    marks = {(hit.attributes.get("class") == "right", hit.all("b")[0].text[0]) for hit in hits}
    assert marks == {(True, "✓"), (False, "✗")}


def test_the_results_table_of_the_page_has_the_cells_of_the_sections(report: dict[str, Any]) -> None:
    summary = collect(report["run"])
    header, *rows = report["page"].table("Results")
    assert header == ["", *column_names(summary)]
    shown = [row for row in rows if len(row) > 1]
    expected = [[row.label, *(cell.text or "–" for cell in row.cells)] for s in sections(summary) for row in s.rows]
    assert shown == [[cell.replace("->", "→") for cell in row] for row in expected]
    intervals = [cell.interval for section in sections(summary) for row in section.rows for cell in row.cells]
    small_print = [small.text for small in report["page"].section("results").all("small")]
    assert small_print == [interval for interval in intervals if interval]


def test_the_page_shows_figures_and_the_command(report: dict[str, Any]) -> None:
    page: Element = report["page"]
    figures = key_figures(collect(report["run"]))
    (shown,) = page.all("dl", kind="figures")
    assert [label.text for label in shown.all("dt")] == [figure.label for figure in figures]
    assert [value.text for value in shown.all("dd", kind="value")] == [figure.value for figure in figures]
    assert page.section("command").all("pre")[0].text == report["run"].read_run()["command"]
    assert "secret" not in page.text


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_report_json_round_trips(report: dict[str, Any]) -> None:
    record = strict((report["folder"] / "report.json").read_text())
    assert record == report_record(collect(report["run"]))
    variant = record["variants"][-1]
    assert (variant["name"], variant["round"]) == ("round 1", 1)
    protocols = report["run"].committed("evaluate-r1").metrics["protocols"]
    assert {name: found["metrics"] for name, found in variant["protocols"].items()} == {
        name: found["metrics"] for name, found in protocols.items()
    }
    rar = report["run"].committed("rar-r0").metrics
    assert record["rounds"][0]["rar"]["eval/reward_gain"] == rar["eval/reward_gain"]
    assert record["rounds"][0]["rar"]["actor/rollout_logprob_diff"] is None
    assert record["rounds"][0]["promotion"] == {"promoted": True, "why": [], "gain": None}
    refused = report["run"].committed("promotion-r1").metrics
    assert record["rounds"][1]["promotion"] == refused
    assert not refused["promoted"]
    assert record["attachments"] == {}
    assert record["peak_memory_mb"] == max(stage.peak_memory_mb for stage in report["run"].stages())
    assert record["seconds"] == pytest.approx(sum(stage.seconds for stage in report["run"].stages()))


def test_key_figures_are_those_of_the_last_round_that_was_not_refused(report: dict[str, Any]) -> None:
    summary = collect(report["run"])
    stages = {stage.name: stage.metrics for stage in report["run"].stages()}
    hits = [stages[f"evaluate-r{n}"]["protocols"]["fine"]["metrics"]["hit@1"]["mean"] for n in (0, 1)]
    gains = [stages[f"rar-r{n}"]["eval/reward_gain"]["mean"] for n in (0, 1)]
    words = [stages[f"evaluate-r{n}"]["attributes"]["mean_words"] for n in (0, 1)]

    def values(summary: RunSummary) -> list[str]:
        return [figure.value for figure in key_figures(summary)[:3]]

    assert values(summary) == [f"{100 * hits[0]:.1f} %", f"{gains[0]:+.3f}", f"{words[0]:.1f}"]
    assert f"{100 * hits[1]:.1f} %" in key_figures(summary)[0].note, "the refused round is not named beside the result"
    undecided = dataclasses.replace(summary, refused=set())
    assert values(undecided) == [f"{100 * hits[1]:.1f} %", f"{gains[1]:+.3f}", f"{words[1]:.1f}"]


def test_peak_memory_that_was_not_measured_is_left_out(report: dict[str, Any]) -> None:
    summary = collect(report["run"])
    first, *rest = summary.stages
    some = dataclasses.replace(
        summary,
        stages=[
            dataclasses.replace(first, peak_memory_mb=None),
            *[dataclasses.replace(each, peak_memory_mb=512.0) for each in rest],
        ],
    )
    assert some.peak_memory_mb == 512.0
    assert [row[-1] for row in stage_table(some).rows] == ["-", *["512"] * (len(rest) + 1)]
    assert "0.5 GiB" in key_figures(some)[-1].note
    none = dataclasses.replace(some, stages=[some.stages[0]])
    assert none.peak_memory_mb is None
    assert report_record(none)["peak_memory_mb"] is None
    assert report_record(none)["stages"][0]["peak_memory_mb"] is None
    assert [row[-1] for row in stage_table(none).rows] == ["-", "-"]
    assert key_figures(none)[-1].note == ""
    rows = read_page(render(none, items=None)).table("Stages")
    assert rows[1:] == [[first.name, f"{first.seconds:,.1f}", "–"], ["all", f"{first.seconds:,.1f}", "–"]]
    (panel,) = plot_panels(some)["stages"]
    panel.draw(axes := Figure().subplots(), LIGHT)
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == [f"{first.seconds:,.1f} s", f"{rest[0].seconds:,.1f} s, 512 MiB"]


@pytest.mark.parametrize(
    "names", [(), ("catalogue",), ("catalogue", "baselines"), ("evaluate-baseline",), ("agcl-r0",), ("evaluate-r0",)]
)
def test_a_report_of_an_unfinished_run(tmp_path: Path, names: tuple[str, ...]) -> None:
    fake = FakeRun(str(tmp_path))
    metrics: dict[str, Any] = {
        "baselines": {"chance": fake.baseline_metrics(0.01, pixels=False)},
        "catalogue": {},
        "agcl-r0": {"train/loss": 1.0},
    }
    for name in names:
        fake.stage(name, metrics.get(name, {"protocols": fake.protocols(0.2)}))
    folder = Path(write_report(fake.run)).parent
    record = strict((folder / "report.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == list(names)
    assert (folder / "stages.png").exists() == bool(names)
    assert not (folder / "rar.png").exists()
    page = read_page((folder / "index.html").read_text("utf-8"))
    assert (page.find("no-stages") is None) == bool(names)
    assert (page.find("stages") is not None) == bool(names)


def test_a_plot_that_no_longer_has_data_is_removed(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("distill", {"train/loss": 1.0}, log=["train/loss"])
    folder = Path(write_report(fake.run)).parent
    assert (folder / "agcl.png").exists()
    fake.stage("distill", {"train/loss": 1.0}, "catalogue")
    stage = fake.run.committed("distill")
    assert stage is not None
    storage.remove(storage.join(stage.directory, "log", "metrics.jsonl"))
    write_report(fake.run)
    assert not (folder / "agcl.png").exists()


def test_stale_stages_are_named_in_a_notice(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("attributes-r0", fake.sizes(8.0))
    fake.stage("agcl-r0", {"train/loss": 1.0}, "attributes-r0")
    assert read_page(render(collect(fake.run), items=None)).find("stale") is None
    fake.stage("attributes-r0", fake.sizes(4.0), "agcl-r0")
    page = read_page(render(collect(fake.run), items=None))
    assert "agcl-r0" in page.section("stale").text
    assert {row[0] for row in page.table("Stages")[1:-1]} >= {"agcl-r0*"}


def test_without_items_examples_are_text(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path), title="Blue mug")
    fake.stage("evaluate-r0", {"protocols": {}}, examples=True)
    examples = read_page(Path(write_report(fake.run)).read_text("utf-8")).section("examples")
    assert examples.all("img") == []
    first = examples.all("article")[0]
    assert first.all("p")[0].text == "Blue mug"
    assert len(first.all("li", kind="right")) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
