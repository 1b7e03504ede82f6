"""The record of the ablation study from the runs of its seeds: means with intervals over seeds, and paired gains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.cit.stale import stale_stages
from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError
from afmrl_ray.retrieval.per_query import read_per_query
from afmrl_ray.retrieval.seeds import over_seeds, paired_gain_over_seeds
from afmrl_ray.runs import STAGE_RECORD, RunDirectory, Stage, StageName
from jobs.experiments.variants import VARIANTS, Variant

log = logging.getLogger(__name__)

_SHARED = frozenset({"catalogue", "models", "baselines"})
"""Stages that all variants have in common."""
_SIZES = ("mean_pairs", "mean_words", "invalid_fraction")
_QUALITY = ("precision", "recall", "f1")
_HELD_OUT = (
    "eval/reward_before", "eval/reward_after", "eval/reward_gain", "eval/attribute_pairs_before",
    "eval/attribute_pairs_after", "eval/invalid_fraction_before", "eval/invalid_fraction_after",
)  # fmt: skip


def study_record(config: Config, runs: Sequence[RunDirectory], *, title: str) -> dict[str, Any]:
    """The content of `ladder.json`: every variant that at least one seed has measured.

    Metrics are fractions between 0 and 1, costs are in seconds. Variants with stale stages are left out with a warning.

    Args:
        config: config of the study.
        runs: one run per seed.
        title: title of tables and charts.

    Raises:
        ConfigError: encoders were trained for different numbers of steps, so that variants cannot be compared.
        ValueError: seeds were measured on different queries.
    """
    stale = [stale_stages(run.stages(), run.read_run()["config"]) for run in runs]
    found = {variant.key: _measured(variant, runs, stale) for variant in VARIANTS}
    steps = _encoder_steps(runs, found)
    return {
        "title": title,
        "protocols": [protocol.name for protocol in config.evaluation.protocols],
        "primary_protocol": config.evaluation.primary_protocol,
        "seeds": len(runs),
        "baselines": _baselines(runs),
        "variants": [
            {**_variant(variant, config, runs, found), "encoder_steps": steps}
            for variant in VARIANTS
            if found[variant.key]
        ],
        "reinforcement": [_reinforcement(number, runs) for number in range(config.cit.rounds)],
    }


def _measured(variant: Variant, runs: Sequence[RunDirectory], stale: Sequence[set[str]]) -> dict[int, Stage]:
    """The evaluation stages of a variant by index of the run."""
    found = {}
    for index, run in enumerate(runs):
        stage = run.committed(variant.evaluation)
        if stage is None:
            continue
        if stage.name in stale[index]:
            log.warning("%s: variant %s is left out, stage %s is stale", run.path, variant.key, stage.name)
            continue
        found[index] = stage
    return found


def _encoder_steps(runs: Sequence[RunDirectory], measured: Mapping[str, Mapping[int, Stage]]) -> int | None:
    """Training steps of the encoders, equal for all variants and seeds; None if nothing is measured."""
    found: dict[int, str] = {}
    for variant in VARIANTS:
        for index in measured[variant.key]:
            training = runs[index].committed(variant.training)
            if training is not None:
                found.setdefault(training.inputs["config"]["agcl"]["steps"], f"{training.name} of {runs[index].path}")
    if len(found) > 1:
        steps = ", ".join(f"{steps} of {name}" for steps, name in found.items())
        raise ConfigError(
            f"ablation study: encoders were trained for different numbers of steps: {steps}; set the same agcl.steps"
        )
    return next(iter(found), None)


def _baselines(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    stage = runs[0].committed("baselines") if runs else None
    if stage is None:
        return {}
    return {
        name: {protocol: record["metrics"] for protocol, record in records.items()}
        for name, records in stage.metrics.items()
    }


def _variant(
    variant: Variant, config: Config, runs: Sequence[RunDirectory], measured: Mapping[str, dict[int, Stage]]
) -> dict[str, Any]:
    stages = measured[variant.key]
    costs = [sum(seconds for _, seconds in upstream_costs(runs[index], variant.evaluation)) for index in stages]
    reference = measured.get(variant.reference, {}) if variant.reference is not None else {}
    paired = sorted(stages.keys() & reference.keys())
    record: dict[str, Any] = {
        "key": variant.key,
        "name": variant.title,
        "reference": variant.reference if paired else None,
        "in_table": variant.in_table,
        "note": variant.note,
        "seeds": len(stages),
        "cost_seconds": asdict(over_seeds(costs)),
        "metrics": _metrics([stage.metrics["protocols"] for stage in stages.values()]),
        "attributes": _attributes([stage.metrics.get("attributes") for stage in stages.values()]),
        "gain": {},
    }
    if paired:
        sides = [reference[index] for index in paired], [stages[index] for index in paired]
        record["gain"] = {protocol: _gains(*sides, protocol, config) for protocol in record["metrics"]}
    return record


def upstream_costs(run: RunDirectory, name: str) -> list[tuple[str, float]]:
    """Names and seconds of all upstream stages of a stage, except those shared by all variants and evaluations."""
    found: dict[str, float] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        path = storage.join(run.path, "stages", current, STAGE_RECORD)
        if current in found or current in _SHARED or not storage.exists(path):
            continue
        record = storage.read_json(path)
        found[current] = record["seconds"]
        waiting += list(record["inputs"].get("upstream", {}))
    return [(stage, seconds) for stage, seconds in found.items() if not stage.startswith("evaluate-")]


def _metrics(protocols: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            metric: asdict(over_seeds([of_seed[name]["metrics"][metric]["mean"] for of_seed in protocols]))
            for metric in record["metrics"]
        }
        for name, record in protocols[0].items()
    }


def _attributes(tables: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    found = [table for table in tables if table is not None]
    if len(found) < len(tables):
        return {}
    record = {name: asdict(over_seeds([table[name] for table in found])) for name in _SIZES}
    if all(table.get("quality") for table in found):
        record |= {name: asdict(over_seeds([table["quality"][name] for table in found])) for name in _QUALITY}
        names = [table["quality"]["names"] for table in found]
        record["names"] = {name: asdict(over_seeds([of[name]["written"] for of in names])) for name in names[0]}
    return record


def _gains(reference: Sequence[Stage], stages: Sequence[Stage], protocol: str, config: Config) -> dict[str, Any]:
    """Paired gains of the metrics that are means over queries."""
    metrics = [
        name for name, value in stages[0].metrics["protocols"][protocol]["metrics"].items() if value["low"] is not None
    ]
    found = {}
    for metric in metrics:
        sides = [[read_per_query(stage, protocol, metric) for stage in side] for side in (reference, stages)]
        rows = sides[0][0][0]
        if not all(np.array_equal(rows, of_seed) for side in sides for of_seed, _ in side):
            raise ValueError(f"ablation study: the variants have different queries of protocol {protocol!r}")
        before, after = (np.stack([values for _, values in side]) for side in sides)
        samples, seed = config.evaluation.bootstrap_samples, config.run.seed
        found[metric] = asdict(paired_gain_over_seeds(before, after, samples=samples, seed=seed))
    return found


def _reinforcement(number: int, runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Held-out reward of a round's RAR, over seeds; empty if a seed does not have it."""
    stages = [run.committed(StageName("rar", number)) for run in runs]
    if any(stage is None for stage in stages):
        return {}

    def mean(name: str) -> dict[str, Any]:
        values = [stage.metrics[name] for stage in stages if stage is not None]
        return asdict(over_seeds([value["mean"] if isinstance(value, dict) else value for value in values]))

    return {"round": number, **{name: mean(name) for name in _HELD_OUT}}
