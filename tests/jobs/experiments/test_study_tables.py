"""The ablation study as tables and charts, from a record of given numbers."""

from __future__ import annotations

import copy
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

from afmrl_ray.report.drawing import LIGHT
from jobs.experiments.study_plots import study_panels
from jobs.experiments.study_tables import read_study, study_heading, study_markdown, study_note, study_tables

matplotlib.use("Agg")


def value(mean: float, half: float | None = 0.01) -> dict[str, float | None]:
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}


def variant(
    key: str, level: float, reference: str | None, gain: dict[str, Any] | None, **changes: Any
) -> dict[str, Any]:
    return {
        "key": key,
        "name": f"<{key}>",
        "reference": reference,
        "in_table": True,
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
    "baselines": {
        "chance": {"fine": {"hit@1": value(0.002, None)}},
        "pixels": {"fine": {"hit@1": value(0.139, 0.014)}},
    },
    "variants": [
        variant("low", 0.211, None, None),
        variant("sure", 0.354, "low", value(0.143, 0.03)),
        variant("unsure", 0.361, "sure", value(0.007, 0.02), attributes=ATTRIBUTES),
        variant("bound", 0.7, "unsure", value(0.339, 0.02), in_table=False, seeds=2),
    ],
    "reinforcement": [],
}


def test_the_first_table_has_hit_gain_and_cost_of_every_variant() -> None:
    tables = study_tables(read_study(RECORD))
    assert tables[0].rows == [
        ["chance", "0.2", "", "", "", "", ""],
        # Without its interval, which is over queries, not over seeds.
        ["pixels", "13.9", "", "", "", "", ""],
        ["<low>", "21.1 ± 1.0", "", "", "100", "61 ± 2", "3"],
        ["<sure>", "35.4 ± 1.0", "+14.3 [+11.3, +17.3]", "<low>", "100", "61 ± 2", "3"],
        ["<unsure>", "36.1 ± 1.0", "+0.7 [-1.3, +2.7]", "<sure>", "100", "61 ± 2", "3"],
        ["(<bound>)", "70.0 ± 1.0", "+33.9 [+31.9, +35.9]", "<unsure>", "100", "61 ± 2", "2"],
    ]
    assert [table.title for table in tables] == [
        "Variants", "fine", "families", "Attributes that the items are searched with",
        "Items that have the attribute, %",
    ]  # fmt: skip
    assert tables[1].columns == ["fine", "hit@1 %", "hit@5 %", "gain in hit@1"]
    assert tables[2].rows[1] == ["<sure>", "17.7 ± 1.0", ""]
    assert tables[3].rows == [
        ["<unsure>", "4.2 ± 0.0", "9.1 ± 0.0", "12.5 ± 1.0", "61.0 ± 1.0", "52.0 ± 1.0", "56.0 ± 1.0"]
    ]
    assert tables[4].columns == ["", "color", "cap"]
    assert tables[4].rows == [["<unsure>", "98 ± 1", "7 ± 1"]]


def test_without_ground_truth_the_quality_columns_are_empty() -> None:
    record = copy.deepcopy(RECORD)
    for name in ("precision", "recall", "f1", "names"):
        del record["variants"][2]["attributes"][name]  # type: ignore[index]
    tables = {table.title: table for table in study_tables(read_study(record))}
    rows = tables["Attributes that the items are searched with"].rows
    assert rows == [["<unsure>", "4.2 ± 0.0", "9.1 ± 0.0", "12.5 ± 1.0", "", "", ""]]
    assert "Items that have the attribute, %" not in tables


def test_the_markdown_has_title_note_and_all_tables() -> None:
    study = read_study(RECORD)
    title, note, *tables = study_markdown(study).strip().split("\n\n")
    assert (title, note) == ("# by hand", study_note(study))
    assert tables == "\n\n".join(table.markdown() for table in study_tables(study)).split("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[1].splitlines()]
    assert rows[-2] == ["<unsure>", "36.1 ± 1.0", "+0.7 [-1.3, +2.7]", "<sure>", "100", "61 ± 2", "3"]


def drawn(number: int) -> Any:
    panel = study_panels(read_study(RECORD))[number]
    axes = Figure().subplots()
    panel.draw(axes, LIGHT)
    return axes


def test_bars_have_the_length_of_the_means_and_upper_bounds_another_colour() -> None:
    axes = drawn(0)
    bars = axes.patches
    assert [bar.get_width() for bar in bars] == pytest.approx([21.1, 35.4, 36.1, 70.0])
    colours = [bar.get_facecolor() for bar in bars]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    assert [text.get_text() for text in axes.texts] == ["21.1", "35.4", "36.1", "70.0"]


def test_a_gain_whose_interval_includes_zero_is_hollow_and_upper_bounds_are_left_out() -> None:
    axes = drawn(1)
    markers = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == "none" for line in markers] == [False, True]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["<sure>", "<unsure>"]


def test_every_other_protocol_has_a_chart_of_its_first_metric() -> None:
    assert len(study_panels(read_study(RECORD))) == 3
    assert [bar.get_width() for bar in drawn(2).patches] == pytest.approx([10.55, 17.7, 18.05, 35.0])


@pytest.mark.parametrize(
    ("run", "heading"),
    [
        ("by hand", "Ablation study"),
        ("by hand-s0", "Ablation study"),
        ("by hand-s", "Ablation study: by hand"),
        ("other-s0", "Ablation study: by hand"),
    ],
)
def test_the_heading_does_not_repeat_the_name_of_the_run(run: str, heading: str) -> None:
    assert study_heading(read_study(RECORD), run) == heading
