"""Two runs side by side: what was set otherwise, what came of it, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.cit.evaluation import read_per_query
from afmrl_ray.cit.stages import RunDirectory, Stage
from afmrl_ray.errors import StorageError
from afmrl_ray.report.collect import Rung, RunSummary, collect
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.labels import metric_label, metric_order
from afmrl_ray.report.text_table import TextTable, points, share
from afmrl_ray.retrieval.evaluate import paired_gain

SAMPLES, SEED = 2000, 0
"""Resamples of a paired difference, and the seed of their draws."""
_SIZES = (
    ("mean_pairs", "pairs", 1.0),
    ("mean_words", "words", 1.0),
    ("invalid_fraction", "invalid %", 100.0),
    ("f1", "F1 %", 100.0),
)


@dataclass(frozen=True)
class Setting:
    """A setting, or a version, that is not the same; empty where a run does not have it."""

    name: str
    left: str
    right: str


@dataclass(frozen=True)
class Difference:
    """A metric of a rung that both runs have.

    Attributes:
        change: right less left; its interval is of a bootstrap over the queries that both answered, or there is none.
    """

    rung: str
    protocol: str
    metric: str
    left: Estimate
    right: Estimate
    change: Estimate


@dataclass(frozen=True)
class Comparison:
    """What is known of two runs.

    Attributes:
        unpaired: why differences have no intervals, or empty.
        uncompared: protocols that only one run has, or empty.
    """

    left: RunSummary
    right: RunSummary
    settings: list[Setting]
    differences: list[Difference]
    unpaired: str
    uncompared: str

    @property
    def names(self) -> tuple[str, str]:
        """What the runs are called; their paths are too long for legends."""
        return _names(self.left, self.right)


def _names(left: RunSummary, right: RunSummary) -> tuple[str, str]:
    if left.name != right.name:
        return left.name, right.name
    return f"{left.name} (left)", f"{right.name} (right)"


def compare(left: RunDirectory, right: RunDirectory) -> Comparison:
    """Read both runs.

    Raises:
        StorageError: one is no run, or no stage is measured in both.
    """
    summaries = collect(left), collect(right)
    prints = [summary.catalogue.get("fingerprint") for summary in summaries]
    other_catalogue = "" if prints[0] == prints[1] else "the runs are of different catalogues"
    differences = []
    reasons: dict[str, set[str]] = {}
    for rung, other in _common(*summaries):
        stages = [stage for run in (left, right) if (stage := run.committed(rung.stage)) is not None]
        for protocol in (name for name in rung.protocols if name in other.protocols):
            sides = rung.protocols[protocol].metrics, other.protocols[protocol].metrics
            metrics = sorted(sides[0].keys() & sides[1].keys(), key=metric_order)
            by_query = [name for name in metrics if all(side[name].has_interval for side in sides)]
            why = other_catalogue
            if by_query and not why:
                why = _why_unpaired(summaries, stages, protocol, by_query[0])
                reasons.setdefault(why, set()).add(protocol)
            for metric in metrics:
                before, after = (side[metric] for side in sides)
                paired = metric in by_query and not why
                change = _paired(stages, protocol, metric) if paired else _change(before, after)
                differences.append(Difference(rung.name, protocol, metric, before, after, change))
    if not differences:
        raise StorageError(
            f"{left.path} and {right.path}: no stage measures the same in both; is one not evaluated yet?"
        )
    unpaired = other_catalogue or "; ".join(f"{why} of {', '.join(sorted(of))}" for why, of in reasons.items() if why)
    return Comparison(*summaries, _settings(*summaries), differences, unpaired, _uncompared(*summaries))


def _common(left: RunSummary, right: RunSummary) -> list[tuple[Rung, Rung]]:
    """Rungs of the same name, but for chance and pixels."""
    others = {rung.name: rung for rung in right.rungs if rung.trained}
    return [(rung, others[rung.name]) for rung in left.rungs if rung.trained and rung.name in others]


def _change(left: Estimate, right: Estimate) -> Estimate:
    if left.mean is None or right.mean is None:
        return Estimate(None)
    return Estimate(right.mean - left.mean)


def _why_unpaired(summaries: tuple[RunSummary, RunSummary], stages: Sequence[Stage], protocol: str, metric: str) -> str:
    """Why a protocol's metrics cannot be paired by query, or empty; its name belongs behind the words."""
    asked = [_asked(stage, summary, protocol) for stage, summary in zip(stages, summaries, strict=True)]
    if asked[0] != asked[1]:
        return "the runs differ in the settings"
    without = [name for stage, name in zip(stages, _names(*summaries), strict=True) if not _has_numbers_by_query(stage)]
    if without:
        return f"{' and '.join(without)} kept no numbers by query"
    left, right = (read_per_query(stage, protocol, metric)[0] for stage in stages)
    return "" if np.array_equal(left, right) else "the runs do not answer the same queries"


def _asked(stage: Stage, summary: RunSummary, protocol: str) -> Any:
    """Settings of a protocol: those that the stage was measured with, or else the run's."""
    evaluation = stage.inputs.get("config", {}).get("evaluation") or summary.config.get("evaluation", {})
    return next((each for each in evaluation.get("protocols", []) if each["name"] == protocol), None)


def _has_numbers_by_query(stage: Stage) -> bool:
    return "per_query" in stage.outputs and storage.exists(stage.output("per_query"))


def _paired(stages: Sequence[Stage], protocol: str, metric: str) -> Estimate:
    before, after = (read_per_query(stage, protocol, metric) for stage in stages)
    return Estimate.of(asdict(paired_gain(before, after, samples=SAMPLES, seed=SEED)))


def _uncompared(left: RunSummary, right: RunSummary) -> str:
    """Which protocols only one run has, at the rungs that both have."""
    rungs = _common(left, right)
    measured = [{name: None for pair in rungs for name in pair[side].protocols} for side in (0, 1)]
    only = [[name for name in measured[side] if name not in measured[1 - side]] for side in (0, 1)]
    names = _names(left, right)
    return "; ".join(f"{name} alone measures {', '.join(of)}" for name, of in zip(names, only, strict=True) if of)


def _settings(left: RunSummary, right: RunSummary) -> list[Setting]:
    sides = [
        {**_flat(each.config), **{f"version of {name}": version for name, version in each.versions.items()}}
        for each in (left, right)
    ]
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    return [
        Setting(name, sides[0].get(name, ""), sides[1].get(name, ""))
        for name in names
        if sides[0].get(name) != sides[1].get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and the values as text; lists of plain values stay whole."""
    found: dict[str, str] = {}
    for name, value in values.items():
        sections = _sections(value)
        if sections is not None:
            found |= _flat(sections, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = "none" if value is None else str(value)
    return found


def _sections(value: Any) -> Mapping[str, Any] | None:
    """A mapping itself, a list of mappings by their `name` or else their place; none = a plain value."""
    if isinstance(value, Mapping):
        return value
    if not (isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value)):
        return None
    names = [each.get("name", "") for each in value]
    if not all(names) or len(set(names)) < len(names):
        names = [str(place) for place in range(len(value))]
    return dict(zip(names, value, strict=True))


def comparison_tables(comparison: Comparison) -> list[TextTable]:
    """Settings, metrics of every rung that both have, attributes, rewards, stages."""
    left, right = comparison.names
    settings = [[each.name, each.left, each.right] for each in comparison.settings]
    found = [TextTable("Settings that differ", ["", left, right], settings)]
    for rung in dict.fromkeys(each.rung for each in comparison.differences):
        rows = [
            [
                f"{each.protocol}: {metric_label(each.metric)} %",
                share(each.left),
                share(each.right),
                points(each.change),
            ]
            for each in comparison.differences
            if each.rung == rung
        ]
        found.append(TextTable(f"Metrics, {rung}", ["", left, right, "difference, points"], rows))
    found += [_attribute_table(comparison), _reward_table(comparison), _stage_table(comparison)]
    return [table for table in found if table.rows]


def _attribute_table(comparison: Comparison) -> TextTable:
    rows = []
    for rung, other in _common(comparison.left, comparison.right):
        for name, label, scale in _SIZES:
            sides = [getattr(each.attributes, name) for each in (rung, other) if each.attributes is not None]
            values = [value for value in sides if value is not None]
            if len(values) == 2:
                rows.append([f"{rung.name}: {label}", *(f"{scale * value:.1f}" for value in values)])
    return TextTable("Attributes of an item", ["", *comparison.names], rows)


def _reward_table(comparison: Comparison) -> TextTable:
    others = {each.number: each for each in comparison.right.rounds}
    rows = []
    for each in comparison.left.rounds:
        pair = [
            summary.reward("eval/reward_gain") for summary in (each, others.get(each.number)) if summary is not None
        ]
        if len(pair) == 2 and all(value is not None for value in pair):
            rows.append([f"round {each.number}: held-out reward gained, points", *(points(v) for v in pair if v)])
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
    """The tables as plain text."""
    notes = [f"{label}: {text}." for label, text in comparison_notes(comparison)]
    return "\n\n".join([*notes, *(table.plain() for table in comparison_tables(comparison))])


def comparison_notes(comparison: Comparison) -> list[tuple[str, str]]:
    """What the tables lack, and why."""
    notes = [("Differences without intervals", comparison.unpaired), ("Not compared", comparison.uncompared)]
    return [(label, text) for label, text in notes if text]
