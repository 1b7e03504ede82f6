"""The ladder in tables, charts and the report, from a record written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from afmrl_ray import storage
from afmrl_ray.report import write_report
from afmrl_ray.report.ladder import LADDER, ladder_heading, ladder_table, ladder_tables, read_ladder
from afmrl_ray.report.ladder_plots import ladder_panels
from afmrl_ray.report.plots import LIGHT, Panel, Theme, draw_png
from tests.report.fake_run import FakeRun

matplotlib.use("Agg")


def value(mean: float, half: float | None = 0.01) -> dict[str, float | None]:
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}


def rung(key: str, level: float, below: str | None, gain: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    return {
        "key": key,
        "name": f"<{key}>",
        "below": below,
        "ladder": True,
        "note": "",
        "seeds": 3,
        "encoder_steps": 100,
        "cost_seconds": value(61.4, 2.0),
        "metrics": {
            "fine": {"hit@1": value(level), "hit@5": value(level + 0.2)},
            "families": {"nmi": value(level / 2)},
        },
        "gain": {"fine": {"hit@1": gain}} if gain is not None else {},
        "attributes": {},
        **changes,
    }


ATTRIBUTES = {
    "mean_pairs": value(4.2), "mean_words": value(9.1), "invalid_fraction": value(0.125),
    "precision": value(0.61), "recall": value(0.52), "f1": value(0.56),
    "names": {"color": value(0.981), "cap": value(0.07)},
}  # fmt: skip

RECORD = {
    "title": "by hand",
    "primary_protocol": "fine",
    "protocols": ["families", "fine"],
    "seeds": 3,
    "floor": {"chance": {"fine": {"hit@1": value(0.002, None)}}, "pixels": {"fine": {"hit@1": value(0.139, 0.014)}}},
    "rungs": [
        rung("low", 0.211, None, None),
        rung("sure", 0.354, "low", value(0.143, 0.03)),
        rung("unsure", 0.361, "sure", value(0.007, 0.02), attributes=ATTRIBUTES),
        rung("ceiling", 0.7, "unsure", value(0.339, 0.02), ladder=False, seeds=2),
    ],
    "reinforcement": [],
}


def test_the_headline_holds_every_number_where_it_belongs() -> None:
    tables = ladder_tables(read_ladder(RECORD))
    assert tables[0].rows == [
        ["chance", "0.2", "", "", "", "", ""],
        # Its interval is over queries, so it has no place among those over seeds.
        ["pixels", "13.9", "", "", "", "", ""],
        ["<low>", "21.1 ± 1.0", "", "", "100", "61 ± 2", "3"],
        ["<sure>", "35.4 ± 1.0", "+14.3 [+11.3, +17.3]", "<low>", "100", "61 ± 2", "3"],
        ["<unsure>", "36.1 ± 1.0", "+0.7 [-1.3, +2.7]", "<sure>", "100", "61 ± 2", "3"],
        ["(<ceiling>)", "70.0 ± 1.0", "+33.9 [+31.9, +35.9]", "<unsure>", "100", "61 ± 2", "2"],
    ]
    assert [table.title for table in tables] == [
        "The ladder", "fine", "families", "Attributes that the items are searched with",
        "Items that have the attribute, %",
    ]  # fmt: skip
    assert tables[1].columns == ["fine", "hit@1 %", "hit@5 %", "gain in hit@1"]
    assert tables[2].rows[1] == ["<sure>", "17.7 ± 1.0", ""]
    assert tables[3].rows == [
        ["<unsure>", "4.2 ± 0.0", "9.1 ± 0.0", "12.5 ± 1.0", "61.0 ± 1.0", "52.0 ± 1.0", "56.0 ± 1.0"]
    ]
    assert tables[4].columns == ["", "color", "cap"]
    assert tables[4].rows == [["<unsure>", "98 ± 1", "7 ± 1"]]


def test_catalogues_without_the_truth_leave_its_columns_empty() -> None:
    record = copy.deepcopy(RECORD)
    for name in ("precision", "recall", "f1", "names"):
        del record["rungs"][2]["attributes"][name]  # type: ignore[index]
    tables = {table.title: table for table in ladder_tables(read_ladder(record))}
    rows = tables["Attributes that the items are searched with"].rows
    assert rows == [["<unsure>", "4.2 ± 0.0", "9.1 ± 0.0", "12.5 ± 1.0", "", "", ""]]
    assert "Items that have the attribute, %" not in tables


def test_markdown_says_what_no_gain_is() -> None:
    text = ladder_table(read_ladder(RECORD))
    assert text.startswith("# by hand\n\n3 seeds;")
    assert "an interval that includes zero is no gain" in text
    assert "| <unsure> | 36.1 ± 1.0 | +0.7 [-1.3, +2.7] | <sure> | 100 | 61 ± 2 | 3 |" in text


def drawn(number: int) -> Any:
    panel = ladder_panels(read_ladder(RECORD))[number]
    axes = Figure().subplots()
    panel.draw(axes, LIGHT)
    return axes


def test_bars_are_as_long_as_the_means_and_ceilings_have_another_colour() -> None:
    axes = drawn(0)
    bars = axes.patches
    assert [bar.get_width() for bar in bars] == pytest.approx([21.1, 35.4, 36.1, 70.0])
    colours = [bar.get_facecolor() for bar in bars]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    assert [text.get_text() for text in axes.texts] == ["21.1", "35.4", "36.1", "70.0"]


def test_a_gain_whose_interval_includes_zero_is_hollow_and_a_ceilings_is_left_out() -> None:
    axes = drawn(1)
    markers = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == "none" for line in markers] == [False, True]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["<sure>", "<unsure>"]


def test_protocols_other_than_the_headline_have_a_chart_each() -> None:
    assert [panel.title for panel in ladder_panels(read_ladder(RECORD))] == [
        "fine: hit@1, %, 95 % over 3 seeds",
        "gain over the rung below, points",
        "families: NMI, %",
    ]


def test_a_title_that_is_wider_than_its_axes_begins_further_to_the_left() -> None:
    def draw(axes: Axes, theme: Theme) -> None:
        axes.barh(["a name that takes most of the room that there is"], [1.0])
        axes_of.append(axes)

    axes_of: list[Axes] = []
    words = ["gain over the rung below, points", "short"]
    draw_png([Panel(title, draw) for title in words])
    titles = [
        axes.findobj(lambda it, word=word: isinstance(it, Text) and it.get_text() == word)
        for axes, word in zip(axes_of, words, strict=True)
    ]
    boxes = [title[0].get_window_extent() for title in titles]
    assert all(box.x1 <= axes.bbox.x1 + 1 for box, axes in zip(boxes, axes_of, strict=True))
    assert boxes[0].x0 < axes_of[0].bbox.x0
    assert boxes[1].x0 == pytest.approx(axes_of[1].bbox.x0, abs=1)


@pytest.mark.parametrize(
    ("run", "heading"),
    [
        ("by hand", "Ladder"),
        ("by hand-s0", "Ladder"),
        ("by hand-s", "Ladder: by hand"),
        ("other-s0", "Ladder: by hand"),
    ],
)
def test_a_title_that_is_only_the_runs_name_is_not_said_twice(run: str, heading: str) -> None:
    assert ladder_heading(read_ladder(RECORD), run) == heading


def test_the_report_of_a_run_shows_the_ladder_that_lies_beside_it(tmp_path: Path) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("catalogue", {})
    folder = Path(write_report(fake.run)).parent
    assert "<h2>Ladder" not in (folder / "index.html").read_text()
    assert not (folder / "ladder.png").exists()
    storage.write_json(storage.join(fake.run.path, LADDER), RECORD)
    write_report(fake.run)
    page = (folder / "index.html").read_text()
    assert "<h2>Ladder: by hand</h2>" in page
    assert "<td>+14.3 [+11.3, +17.3]</td>" in page.replace("\n", "")
    assert "&lt;unsure&gt;" in page
    assert "<unsure>" not in page
    assert (folder / "ladder.png").exists()
