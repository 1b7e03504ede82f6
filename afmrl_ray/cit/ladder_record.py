"""The runs of several seeds folded into one record of the ladder: means and intervals over seeds, paired gains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.cit.evaluation import read_per_query
from afmrl_ray.cit.ladder import RUNGS, Rung
from afmrl_ray.cit.stages import RECORD, RunDirectory, Stage
from afmrl_ray.cit.stale import stale_stages
from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError
from afmrl_ray.retrieval.seeds import over_seeds, paired_gain_over_seeds

log = logging.getLogger(__name__)

_FREE = frozenset({"catalogue", "models", "floor"})
"""Stages that every rung shares, or that measure."""
_SIZES = ("mean_pairs", "mean_words", "invalid_fraction")
_QUALITY = ("precision", "recall", "f1")
_HELD_OUT = (
    "eval/reward_before", "eval/reward_after", "eval/reward_gain", "eval/attribute_pairs_before",
    "eval/attribute_pairs_after", "eval/invalid_fraction_before", "eval/invalid_fraction_after",
)  # fmt: skip


def ladder_record(config: Config, runs: Sequence[RunDirectory], *, title: str) -> dict[str, Any]:
    """What `ladder.json` holds: every rung that any seed has measured; shares between 0 and 1, seconds.

    A rung that was made with other settings than its run has now is left out with a warning.

    Args:
        config: of the ladder.
        runs: one for each seed.
        title: of tables and charts.

    Raises:
        ConfigError: encoders were trained for different numbers of steps, so that rungs cannot be compared.
        ValueError: seeds answered different queries.
    """
    stale = [stale_stages(run.stages(), run.read_run()["config"]) for run in runs]
    found = {rung.key: _measured(rung, runs, stale) for rung in RUNGS}
    steps = _encoder_steps(runs, found)
    return {
        "title": title,
        "protocols": [protocol.name for protocol in config.evaluation.protocols],
        "primary_protocol": config.evaluation.primary_protocol,
        "seeds": len(runs),
        "floor": _floor(runs),
        "rungs": [{**_rung(rung, config, runs, found), "encoder_steps": steps} for rung in RUNGS if found[rung.key]],
        "reinforcement": [_reinforcement(number, runs) for number in range(config.cit.rounds)],
    }


def _measured(rung: Rung, runs: Sequence[RunDirectory], stale: Sequence[set[str]]) -> dict[int, Stage]:
    """The evaluation of a rung by the place of the run."""
    found = {}
    for place, run in enumerate(runs):
        stage = run.committed(rung.evaluation)
        if stage is None:
            continue
        if stage.name in stale[place]:
            log.warning("%s: rung %s is left out, stage %s has other settings", run.path, rung.key, stage.name)
            continue
        found[place] = stage
    return found


def _encoder_steps(runs: Sequence[RunDirectory], measured: Mapping[str, Mapping[int, Stage]]) -> int | None:
    """Steps that the encoder of every rung and seed was trained for; none where nothing is measured."""
    found: dict[int, str] = {}
    for rung in RUNGS:
        for place in measured[rung.key]:
            training = runs[place].committed(rung.training)
            if training is not None:
                found.setdefault(training.inputs["config"]["agcl"]["steps"], f"{training.name} of {runs[place].path}")
    if len(found) > 1:
        told = ", ".join(f"{steps} of {name}" for steps, name in found.items())
        raise ConfigError(f"ladder: encoders take different numbers of steps: {told}; give all agcl.steps alike")
    return next(iter(found), None)


def _floor(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    stage = runs[0].committed("floor") if runs else None
    if stage is None:
        return {}
    return {
        name: {protocol: record["metrics"] for protocol, record in records.items()}
        for name, records in stage.metrics.items()
    }


def _rung(
    rung: Rung, config: Config, runs: Sequence[RunDirectory], measured: Mapping[str, dict[int, Stage]]
) -> dict[str, Any]:
    stages = measured[rung.key]
    costs = [sum(seconds for _, seconds in stands_on(runs[place], rung.evaluation)) for place in stages]
    below = measured.get(rung.below, {}) if rung.below is not None else {}
    paired = sorted(stages.keys() & below.keys())
    record: dict[str, Any] = {
        "key": rung.key,
        "name": rung.title,
        "below": rung.below if paired else None,
        "ladder": rung.ladder,
        "note": rung.note,
        "seeds": len(stages),
        "cost_seconds": asdict(over_seeds(costs)),
        "metrics": _metrics([stage.metrics["protocols"] for stage in stages.values()]),
        "attributes": _attributes([stage.metrics.get("attributes") for stage in stages.values()]),
        "gain": {},
    }
    if paired:
        sides = [below[place] for place in paired], [stages[place] for place in paired]
        record["gain"] = {protocol: _gains(*sides, protocol, config) for protocol in record["metrics"]}
    return record


def stands_on(run: RunDirectory, name: str) -> list[tuple[str, float]]:
    """Names and seconds of the stages that a stage stands on, but for those that every rung shares or that measure."""
    found: dict[str, float] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        path = storage.join(run.path, "stages", current, RECORD)
        if current in found or current in _FREE or not storage.exists(path):
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
    there = [table for table in tables if table is not None]
    if len(there) < len(tables):
        return {}
    record = {name: asdict(over_seeds([table[name] for table in there])) for name in _SIZES}
    if all(table.get("quality") for table in there):
        record |= {name: asdict(over_seeds([table["quality"][name] for table in there])) for name in _QUALITY}
        shares = [table["quality"]["names"] for table in there]
        record["names"] = {name: asdict(over_seeds([of[name]["written"] for of in shares])) for name in shares[0]}
    return record


def _gains(below: Sequence[Stage], above: Sequence[Stage], protocol: str, config: Config) -> dict[str, Any]:
    """Paired gain of every metric that is a mean over queries."""
    metrics = [
        name for name, value in above[0].metrics["protocols"][protocol]["metrics"].items() if value["low"] is not None
    ]
    found = {}
    for metric in metrics:
        sides = [[read_per_query(stage, protocol, metric) for stage in stages] for stages in (below, above)]
        rows = sides[0][0][0]
        if not all(np.array_equal(rows, of_seed) for side in sides for of_seed, _ in side):
            raise ValueError(f"ladder: the rungs do not answer the same queries of protocol {protocol!r}")
        before, after = (np.stack([values for _, values in side]) for side in sides)
        samples, seed = config.evaluation.bootstrap_samples, config.run.seed
        found[metric] = asdict(paired_gain_over_seeds(before, after, samples=samples, seed=seed))
    return found


def _reinforcement(number: int, runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Held-out reward of a round's RAR, over seeds; empty where a seed lacks it."""
    stages = [run.committed(f"rar-r{number}") for run in runs]
    if any(stage is None for stage in stages):
        return {}

    def mean(name: str) -> dict[str, Any]:
        values = [stage.metrics[name] for stage in stages if stage is not None]
        return asdict(over_seeds([value["mean"] if isinstance(value, dict) else value for value in values]))

    return {"round": number, **{name: mean(name) for name in _HELD_OUT}}
