"""The stage that decides whether a round is promoted; the rules are in `cit.promotion`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from afmrl_ray import storage
from afmrl_ray.cit.promotion import GUARDED, decide
from afmrl_ray.cit.spec import StageContext, StageSpec
from afmrl_ray.config import Config
from afmrl_ray.retrieval.evaluate import Value, paired_gain
from afmrl_ray.retrieval.per_query import FILE, read_per_query
from afmrl_ray.runs import Stage, StageName, StageOutcome


def declare_promotion(config: Config, number: int) -> StageSpec:
    upstream = {"now": StageName("evaluate", number)}
    if number:
        upstream["before"] = StageName("evaluate", number - 1)
        upstream["last"] = StageName("promotion", number - 1)
    return StageSpec(
        StageName("promotion", number),
        promotion_stage,
        reads=(
            *("run", "cit.gate", "cit.selection_protocol"),
            *(f"evaluation.{name}" for name in ("protocols", "primary_protocol", "bootstrap_samples")),
        ),
        upstream=upstream,
        parameters={"round": number},
    )


def promotion_stage(context: StageContext) -> StageOutcome:
    """Compares a round's evaluation with those of the last promoted round and of the round before."""
    config, now = context.config, context.upstream["now"]
    before, last = context.upstream.get("before"), context.upstream.get("last")

    def change(since: Stage, protocol: str, metric: str) -> Value:
        numbers = (read_per_query(stage, protocol, metric) for stage in (since, now))
        return paired_gain(*numbers, samples=config.evaluation.bootstrap_samples, seed=config.run.seed)

    kinds = {protocol.name: protocol.kind for protocol in config.evaluation.protocols}
    guarded = config.cit.gate.protocols if last is not None else ()
    changes = {name: change(last, name, GUARDED[kinds[name]]) for name in guarded if last is not None}
    decision = decide(changes, config.cit.gate)
    metrics: dict[str, Any] = {
        "promoted": decision.promoted,
        "promoted_round": context.parameters["round"],
        "why": decision.why,
        "changes": {name: asdict(value) for name, value in changes.items()},
    }
    if last is not None and not decision.promoted:
        metrics["promoted_round"] = last.metrics["promoted_round"]
    if before is not None:
        protocol = config.cit.selection_protocol or config.evaluation.primary_protocol
        metrics["gain"] = asdict(change(before, protocol, "hit@1"))
    # The promoted round's numbers by query go with the decision, so that a later one needs no earlier evaluation.
    promoted = now if decision.promoted or last is None else last
    storage.write_bytes(context.path(FILE), storage.read_bytes(promoted.output("per_query")))
    return StageOutcome({"per_query": FILE}, metrics)
