"""The written report: files, page and numbers."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from afmrl_ray import storage
from afmrl_ray.report import write_report
from afmrl_ray.report.collect import collect
from afmrl_ray.report.html import duration, key_figures, render
from afmrl_ray.report.ladder import LADDER, read_ladder
from afmrl_ray.report.plots import DARK, LIGHT, draw_png, plot_panels
from afmrl_ray.report.table import format_stages
from afmrl_ray.report.write import report_record
from tests.report.fake_run import FakeItems, FakeRun
from tests.report.test_ladder import RECORD

HOSTILE_TITLE = "<script>alert('title')</script> \"onload=alert(1)"
HOSTILE_ATTRIBUTES = "color: </dd><img src=x onerror=alert(2)>"
ADDRESS = re.compile(r"(?:https?:)?//|url\(|@import", re.IGNORECASE)


class Page(HTMLParser):
    """Collects tags with their attributes, text, and what lies inside <style>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.style = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open[-1:]:
            self.style += data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    fake = FakeRun(str(tmp_path_factory.mktemp("runs")), title=HOSTILE_TITLE, attributes=HOSTILE_ATTRIBUTES)
    run = fake.everything()
    index = Path(write_report(run, items=FakeItems()))
    return {"run": run, "folder": index.parent, "page": Page(index.read_text("utf-8")), "index": index}


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


def test_panels_follow_the_logged_keys(report: dict[str, Any]) -> None:
    panels = plot_panels(collect(report["run"]))
    assert panels["metrics"][0].title == "fine: hit@k, %"
    assert [panel.title for panel in panels["rar"]] == [
        "reward",
        "invalid share",
        "groups without variance, share",
        "KL to the round's start, nats a token",
        "pairs of valid attributes",
        "sampler against learner, nats a token",
        "share of completions that name it, round 0",
        "share of completions that name it, round 1",
    ]
    assert "masked negatives, share" in [panel.title for panel in panels["agcl"]]
    images = [Image.open(io.BytesIO(draw_png(panels["rar"][:1], theme))) for theme in (LIGHT, DARK)]
    light, dark = (float(np.median(np.asarray(image.convert("L")))) for image in images)
    assert light > 240
    assert dark < 60


def test_the_page_needs_nothing_from_elsewhere(report: dict[str, Any]) -> None:
    page = report["page"]
    assert not ADDRESS.search(page.style)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name, value in attributes.items():
            if name in {"src", "srcset", "href", "action", "poster", "background"}:
                assert value is not None
                assert value.startswith("data:image/"), f"{tag} {name}={value[:60]}"
            else:
                assert not ADDRESS.search(value or ""), f"{tag} {name}={value}"
                assert not name.startswith("on")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(attributes["alt"] for attributes in images)
    assert sum(attributes["src"].startswith("data:image/jpeg") for attributes in images) == 3 * 6


def test_hostile_titles_and_attributes_stay_text(report: dict[str, Any]) -> None:
    source = report["index"].read_text("utf-8")
    assert "<script" not in source
    assert "<img src=x" not in source
    assert HOSTILE_TITLE in "".join(report["page"].text)
    assert HOSTILE_ATTRIBUTES in "".join(report["page"].text)


def test_hits_are_marked_by_more_than_colour(report: dict[str, Any]) -> None:
    text = " ".join(report["page"].text)
    assert text.count("✓ right") == 3
    assert text.count("✗ wrong") == 12


def test_the_page_shows_numbers_intervals_and_how_to_run_it(report: dict[str, Any]) -> None:
    text = report["page"].text
    hit = report["run"].committed("evaluate-r1").metrics["protocols"]["fine"]["metrics"]["hit@1"]
    assert f"{100 * hit['mean']:.1f}" in text
    assert f"{100 * hit['low']:.1f} to {100 * hit['high']:.1f}" in text
    assert "python jobs/run_cit.py --config jobs/configs/fake.yaml" in text
    assert "secret" not in "".join(text)


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_report_json_round_trips(report: dict[str, Any]) -> None:
    record = strict((report["folder"] / "report.json").read_text())
    assert record == report_record(collect(report["run"]))
    rung = record["rungs"][-1]
    assert (rung["name"], rung["round"]) == ("round 1", 1)
    protocols = report["run"].committed("evaluate-r1").metrics["protocols"]
    assert {name: found["metrics"] for name, found in rung["protocols"].items()} == {
        name: found["metrics"] for name, found in protocols.items()
    }
    rar = report["run"].committed("rar-r0").metrics
    assert record["rounds"][0]["rar"]["heldout_gain"] == rar["heldout_gain"]
    assert record["rounds"][0]["rar"]["rollout_logprob_diff"] is None
    assert record["rounds"][0]["promotion"] == {"promoted": True, "why": [], "gain": None}
    refused = report["run"].committed("promotion-r1").metrics
    assert record["rounds"][1]["promotion"] == refused
    assert (refused["promoted"], refused["why"]) == (False, ["labels changes by -0.0310"])
    assert record["ladder"] is None
    assert record["peak_memory_mb"] == max(stage.peak_memory_mb for stage in report["run"].stages())
    assert record["seconds"] == pytest.approx(sum(stage.seconds for stage in report["run"].stages()))


def test_report_json_holds_the_ladder_that_its_charts_show(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    storage.write_json(storage.join(fake.run.path, LADDER), RECORD)
    record = strict((Path(write_report(fake.run)).parent / "report.json").read_text())
    assert record["ladder"] == dataclasses.asdict(read_ladder(RECORD))
    gain = RECORD["rungs"][1]["gain"]["fine"]["hit@1"]
    assert record["ladder"]["rungs"][1]["gain"]["fine"]["hit@1"] == gain
    assert record["ladder"]["floors"]["chance"]["fine"]["hit@1"] == RECORD["floor"]["chance"]["fine"]["hit@1"]


def test_key_figures_are_those_of_the_last_round_that_was_not_refused(report: dict[str, Any]) -> None:
    summary = collect(report["run"])
    stages = {stage.name: stage.metrics for stage in report["run"].stages()}
    hits = [100 * stages[f"evaluate-r{n}"]["protocols"]["fine"]["metrics"]["hit@1"]["mean"] for n in (0, 1)]
    hit, reward, words, _ = key_figures(summary)
    assert (hit.label, hit.value) == ("hit@1, fine, round 0", f"{hits[0]:.1f} %")
    assert hit.note.endswith(f"round 1 (refused) {hits[1]:.1f} %")
    assert reward.label.endswith("round 0")
    assert words.label.endswith("round 0")
    assert words.value == f"{stages['evaluate-r0']['attributes']['mean_words']:.1f}"
    undecided = dataclasses.replace(summary, refused=set())
    assert [figure.label for figure in key_figures(undecided)[:3]] == [
        "hit@1, fine, round 1",
        "held-out reward gained by RAR, round 1",
        "words of attributes, round 1",
    ]


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
    assert [line.split()[-1] for line in format_stages(some).splitlines()[1:]] == ["-", *["512"] * (len(rest) + 1)]
    assert key_figures(some)[-1].note == "peak memory 0.5 GiB"
    none = dataclasses.replace(some, stages=[some.stages[0]])
    assert none.peak_memory_mb is None
    assert report_record(none)["peak_memory_mb"] is None
    assert report_record(none)["stages"][0]["peak_memory_mb"] is None
    assert [line.split()[-1] for line in format_stages(none).splitlines()[1:]] == ["-", "-"]
    assert key_figures(none)[-1].note == ""
    page = re.sub(r"\s+", "", render(none, items=None))
    assert f"<td>{first.seconds:,.1f}</td><td>–</td>" in page
    figure = Figure()
    (panel,) = plot_panels(some)["stages"]
    panel.draw(axes := figure.subplots(), LIGHT)
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == [f"{first.seconds:,.1f} s", f"{rest[0].seconds:,.1f} s, 512 MiB"]


@pytest.mark.parametrize(
    "names", [(), ("catalogue",), ("catalogue", "floor"), ("evaluate-baseline",), ("agcl-r0",), ("evaluate-r0",)]
)
def test_a_report_of_an_unfinished_run(tmp_path: Path, names: tuple[str, ...]) -> None:
    fake = FakeRun(str(tmp_path))
    metrics: dict[str, Any] = {
        "floor": {"chance": fake.floor(0.01, pixels=False)},
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
    assert ("No stage is committed yet" in (folder / "index.html").read_text()) == (not names)


def test_a_plot_without_data_any_more_is_removed(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("distill", {"train/loss": 1.0}, log=["train/loss"])
    folder = Path(write_report(fake.run)).parent
    assert (folder / "agcl.png").exists()
    fake.stage("distill", {"train/loss": 1.0}, "catalogue")
    stage = fake.run.committed("distill")
    assert stage is not None
    (Path(stage.directory) / "log" / "metrics.jsonl").unlink()
    write_report(fake.run)
    assert not (folder / "agcl.png").exists()


def test_without_items_examples_are_text(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path), title="Blue mug")
    fake.stage("evaluate-r0", {"protocols": {}}, examples=True)
    source = Path(write_report(fake.run)).read_text()
    assert "data:image/jpeg" not in source
    assert "Blue mug" in source
    assert "✓ right" in source


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
