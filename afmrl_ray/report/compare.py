"""Two runs side by side: what was set otherwise, what came of it, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray.cit.evaluation import read_per_query
from afmrl_ray.cit.stages import RunDirectory
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
    ("invalid_share", "invalid %", 100.0),
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
    """

    left: RunSummary
    right: RunSummary
    settings: list[Setting]
    differences: list[Difference]
    unpaired: str

    @property
    def names(self) -> tuple[str, str]:
        """What the runs are called; their paths are too long for legends."""
        if self.left.name != self.right.name:
            return self.left.name, self.right.name
        return f"{self.left.name} (left)", f"{self.right.name} (right)"


def compare(left: RunDirectory, right: RunDirectory) -> Comparison:
    """Read both runs.

    Raises:
        StorageError: one is no run, or no stage is measured in both.
    """
    summaries = collect(left), collect(right)
    prints = [summary.catalogue.get("fingerprint") for summary in summaries]
    unpaired = "" if prints[0] == prints[1] else "the runs are of different catalogues"
    differences, other_queries = [], set()
    for rung, other in _common(*summaries):
        for protocol in (name for name in rung.protocols if name in other.protocols):
            sides = rung.protocols[protocol].metrics, other.protocols[protocol].metrics
            for metric in sorted(sides[0].keys() & sides[1].keys(), key=metric_order):
                change = _change(sides[0][metric], sides[1][metric])
                if not unpaired and sides[0][metric].has_interval:
                    paired = _paired((left, right), rung.stage, protocol, metric)
                    if paired is None:
                        other_queries.add(protocol)
                    change = paired or change
                before, after = (side[metric] for side in sides)
                differences.append(Difference(rung.name, protocol, metric, before, after, change))
    if not differences:
        raise StorageError(
            f"{left.path} and {right.path}: no stage measures the same in both; is one not evaluated yet?"
        )
    if other_queries:
        unpaired = f"the runs do not answer the same queries of {', '.join(sorted(other_queries))}"
    return Comparison(*summaries, _settings(*summaries), differences, unpaired)


def _common(left: RunSummary, right: RunSummary) -> list[tuple[Rung, Rung]]:
    """Rungs of the same name, but for chance and pixels."""
    others = {rung.name: rung for rung in right.rungs if rung.trained}
    return [(rung, others[rung.name]) for rung in left.rungs if rung.trained and rung.name in others]


def _change(left: Estimate, right: Estimate) -> Estimate:
    if left.mean is None or right.mean is None:
        return Estimate(None)
    return Estimate(right.mean - left.mean)


def _paired(runs: tuple[RunDirectory, RunDirectory], stage: str, protocol: str, metric: str) -> Estimate | None:
    """The paired difference, or none where a side has no numbers by query or the queries differ."""
    found = [run.committed(stage) for run in runs]
    sides = [read_per_query(each, protocol, metric) for each in found if each and "per_query" in each.outputs]
    if len(sides) < len(runs) or not np.array_equal(sides[0][0], sides[1][0]):
        return None
    return Estimate.of(asdict(paired_gain(*sides, samples=SAMPLES, seed=SEED)))


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
    """Dotted names and the values as text; lists stay whole."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = "none" if value is None else str(value)
    return found


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
    return TextTable("Attributes of a listing", ["", *comparison.names], rows)


def _reward_table(comparison: Comparison) -> TextTable:
    others = {each.number: each for each in comparison.right.rounds}
    rows = []
    for each in comparison.left.rounds:
        pair = [summary.reward("heldout_gain") for summary in (each, others.get(each.number)) if summary is not None]
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
    notes = [f"No intervals of differences: {comparison.unpaired}."] if comparison.unpaired else []
    return "\n\n".join([*notes, *(table.plain() for table in comparison_tables(comparison))])
