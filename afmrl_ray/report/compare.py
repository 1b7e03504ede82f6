"""Comparison of two runs: settings that differ, and differences of metrics, paired by query where possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.errors import StorageError
from afmrl_ray.report.collect import collect
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.labels import metric_order
from afmrl_ray.report.summary import RunSummary, Variant
from afmrl_ray.retrieval.evaluate import paired_gain
from afmrl_ray.retrieval.per_query import read_per_query
from afmrl_ray.runs import RunDirectory, Stage

SAMPLES, SEED = 2000, 0
"""Resamples of a paired difference, and the seed of their draws."""


@dataclass(frozen=True)
class Setting:
    """A setting or version that differs; empty where a run does not have it."""

    name: str
    left: str
    right: str


@dataclass(frozen=True)
class Difference:
    """A metric of a variant that both runs have.

    Attributes:
        change: right minus left, with the interval of a bootstrap over the common queries where they can be paired.
    """

    variant: str
    protocol: str
    metric: str
    left: Estimate
    right: Estimate
    change: Estimate


@dataclass(frozen=True)
class Comparison:
    """The comparison of two runs.

    Attributes:
        unpaired: why some differences have no intervals, or empty.
        uncompared: protocols that only one run measures, or empty.
    """

    left: RunSummary
    right: RunSummary
    settings: list[Setting]
    differences: list[Difference]
    unpaired: str
    uncompared: str

    @property
    def names(self) -> tuple[str, str]:
        """Short names of the runs, different from one another."""
        return _names(self.left, self.right)


def _names(left: RunSummary, right: RunSummary) -> tuple[str, str]:
    if left.name != right.name:
        return left.name, right.name
    return f"{left.name} (left)", f"{right.name} (right)"


def compare(left: RunDirectory, right: RunDirectory) -> Comparison:
    """Read both runs.

    Raises:
        StorageError: a path holds no run, or the runs have no metric in common.
    """
    summaries = collect(left), collect(right)
    prints = [summary.catalogue.get("fingerprint") for summary in summaries]
    other_catalogue = "" if prints[0] == prints[1] else "the runs are of different catalogues"
    differences = []
    reasons: dict[str, set[str]] = {}
    for variant, other in common_variants(*summaries):
        stages = [stage for run in (left, right) if (stage := run.committed(variant.stage)) is not None]
        for protocol in (name for name in variant.protocols if name in other.protocols):
            sides = variant.protocols[protocol].metrics, other.protocols[protocol].metrics
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
                differences.append(Difference(variant.name, protocol, metric, before, after, change))
    if not differences:
        raise StorageError(
            f"{left.path} and {right.path}: no stage measures the same in both; is one not evaluated yet?"
        )
    unpaired = other_catalogue or "; ".join(f"{why} of {', '.join(sorted(of))}" for why, of in reasons.items() if why)
    return Comparison(*summaries, _settings(*summaries), differences, unpaired, _uncompared(*summaries))


def common_variants(left: RunSummary, right: RunSummary) -> list[tuple[Variant, Variant]]:
    """Pairs of trained variants of the same name."""
    others = {variant.name: variant for variant in right.variants if variant.trained}
    return [(each, others[each.name]) for each in left.variants if each.trained and each.name in others]


def _change(left: Estimate, right: Estimate) -> Estimate:
    if left.mean is None or right.mean is None:
        return Estimate(None)
    return Estimate(right.mean - left.mean)


def _why_unpaired(summaries: tuple[RunSummary, RunSummary], stages: Sequence[Stage], protocol: str, metric: str) -> str:
    """Why a protocol's metrics cannot be paired by query, as text that goes before the protocol's name, or empty."""
    asked = [_asked(stage, summary, protocol) for stage, summary in zip(stages, summaries, strict=True)]
    if asked[0] != asked[1]:
        return "the runs differ in the settings"
    without = [name for stage, name in zip(stages, _names(*summaries), strict=True) if not _has_numbers_by_query(stage)]
    if without:
        return f"{' and '.join(without)} kept no numbers by query"
    left, right = (read_per_query(stage, protocol, metric)[0] for stage in stages)
    return "" if np.array_equal(left, right) else "the runs do not answer the same queries"


def _asked(stage: Stage, summary: RunSummary, protocol: str) -> Any:
    """Settings of a protocol: those that the stage was measured with, or else those of the run."""
    evaluation = stage.inputs.get("config", {}).get("evaluation") or summary.config.get("evaluation", {})
    return next((each for each in evaluation.get("protocols", []) if each["name"] == protocol), None)


def _has_numbers_by_query(stage: Stage) -> bool:
    return "per_query" in stage.outputs and storage.exists(stage.output("per_query"))


def _paired(stages: Sequence[Stage], protocol: str, metric: str) -> Estimate:
    before, after = (read_per_query(stage, protocol, metric) for stage in stages)
    return Estimate.of(asdict(paired_gain(before, after, samples=SAMPLES, seed=SEED)))


def _uncompared(left: RunSummary, right: RunSummary) -> str:
    """Protocols that only one run measures, over the common variants."""
    variants = common_variants(left, right)
    measured = [{name: None for pair in variants for name in pair[side].protocols} for side in (0, 1)]
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
    """Values as text by dotted name; a list of plain values is one value."""
    found: dict[str, str] = {}
    for name, value in values.items():
        sections = _sections(value)
        if sections is not None:
            found |= _flat(sections, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = "none" if value is None else str(value)
    return found


def _sections(value: Any) -> Mapping[str, Any] | None:
    """A mapping itself, or a list of mappings keyed by their `name` or else their index; None = a plain value."""
    if isinstance(value, Mapping):
        return value
    if not (isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value)):
        return None
    names = [each.get("name", "") for each in value]
    if not all(names) or len(set(names)) < len(names):
        names = [str(place) for place in range(len(value))]
    return dict(zip(names, value, strict=True))
