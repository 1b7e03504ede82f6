"""The comparison of two runs as tables and as text."""

from __future__ import annotations

from afmrl_ray.report.compare import Comparison, common_variants
from afmrl_ray.report.format import format_percent, format_points
from afmrl_ray.report.labels import metric_label
from afmrl_ray.report.text_table import TextTable, print_tables

_SIZES = (
    ("mean_pairs", "pairs", 1.0),
    ("mean_words", "words", 1.0),
    ("invalid_fraction", "invalid %", 100.0),
    ("f1", "F1 %", 100.0),
)


def comparison_tables(comparison: Comparison) -> list[TextTable]:
    """Settings, metrics of every common variant, attributes, rewards, stages."""
    left, right = comparison.names
    settings = [[each.name, each.left, each.right] for each in comparison.settings]
    found = [TextTable("Settings that differ", ["", left, right], settings)]
    for variant in dict.fromkeys(each.variant for each in comparison.differences):
        rows = [
            [
                f"{each.protocol}: {metric_label(each.metric)} %",
                format_percent(each.left),
                format_percent(each.right),
                format_points(each.change),
            ]
            for each in comparison.differences
            if each.variant == variant
        ]
        found.append(TextTable(f"Metrics, {variant}", ["", left, right, "difference, points"], rows))
    found += [_attribute_table(comparison), _reward_table(comparison), _stage_table(comparison)]
    return [table for table in found if table.rows]


def _attribute_table(comparison: Comparison) -> TextTable:
    rows = []
    for variant, other in common_variants(comparison.left, comparison.right):
        for name, label, scale in _SIZES:
            sides = [getattr(each.attributes, name) for each in (variant, other) if each.attributes is not None]
            values = [value for value in sides if value is not None]
            if len(values) == 2:
                rows.append([f"{variant.name}: {label}", *(f"{scale * value:.1f}" for value in values)])
    return TextTable("Attributes of an item", ["", *comparison.names], rows)


def _reward_table(comparison: Comparison) -> TextTable:
    others = {each.number: each for each in comparison.right.rounds}
    rows = []
    for each in comparison.left.rounds:
        pair = [
            summary.reward("eval/reward_gain") for summary in (each, others.get(each.number)) if summary is not None
        ]
        if len(pair) == 2 and all(value is not None for value in pair):
            rows.append(
                [f"round {each.number}: held-out reward gained, points", *(format_points(v) for v in pair if v)]
            )
    return TextTable("RAR", ["", *comparison.names], rows)


def _stage_table(comparison: Comparison) -> TextTable:
    sides = [{stage.name: stage.seconds for stage in each.stages} for each in (comparison.left, comparison.right)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        seconds = [side.get(name) for side in sides]
        rows.append([name, *("" if value is None else f"{value:.1f}" for value in seconds), _ratio(*seconds)])
    rows.append(["all", *(f"{sum(side.values()):.1f}" for side in sides), ""])
    return TextTable("Stages, seconds", ["", *comparison.names, "right / left"], rows)


def _ratio(left: float | None, right: float | None) -> str:
    return f"{right / left:.2f}" if left and right is not None else ""


def comparison_text(comparison: Comparison) -> str:
    """The tables and notes as plain text."""
    return "\n\n".join([*(table.plain() for table in comparison_tables(comparison)), *_notes(comparison)])


def print_comparison(comparison: Comparison) -> None:
    """Print the tables and notes to standard output, with bold headers on a terminal."""
    print_tables(comparison_tables(comparison), notes=_notes(comparison))


def _notes(comparison: Comparison) -> list[str]:
    return [f"{label}: {text}." for label, text in comparison_notes(comparison)]


def comparison_notes(comparison: Comparison) -> list[tuple[str, str]]:
    """What the tables do not show, as label and reason."""
    notes = [("Differences without intervals", comparison.unpaired), ("Not compared", comparison.uncompared)]
    return [(label, text) for label, text in notes if text]
