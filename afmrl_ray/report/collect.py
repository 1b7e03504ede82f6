"""Reads the committed stages of a run directory into a `RunSummary`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afmrl_ray import storage
from afmrl_ray.cit.stale import stale_stages
from afmrl_ray.errors import StorageError
from afmrl_ray.redact import without_credentials
from afmrl_ray.report.attachment import read_attachments
from afmrl_ray.report.estimate import Estimate, finite
from afmrl_ray.report.examples import attributes_by_round, read_examples
from afmrl_ray.report.rollouts import read_rollouts
from afmrl_ray.report.summary import (
    AttributeSizes,
    Log,
    Promotion,
    ProtocolResult,
    Round,
    RunSummary,
    StageCost,
    Variant,
)
from afmrl_ray.runs import RunDirectory, Stage, StageName
from afmrl_ray.training.metrics_log import read_metrics


def collect(run: RunDirectory) -> RunSummary:
    """Read a run, finished or not.

    Raises:
        StorageError: the path holds no run.
    """
    if not storage.exists(storage.join(run.path, "run.json")):
        raise StorageError(f"{run.path}: no run.json, so no run to report on; check run.storage_path and run.name")
    recorded = run.read_run()
    found = {StageName.parse(stage.name): stage for stage in run.stages()}
    # Fingerprints were computed with the credentials in place.
    stale = stale_stages(list(found.values()), recorded.get("config", {}))
    record = without_credentials(recorded)
    config = record.get("config", {})
    numbers = sorted({name.round for name in found if name.round is not None})
    # The attributes written after the last RAR are not a round of their own.
    rounds = [each for each in (_round(found, number) for number in numbers) if each.number == 0 or each.agcl]
    evaluated = {n: stage for n in numbers if (stage := found.get(StageName("evaluate", n))) is not None}
    refused = {n for n in numbers if (each := _promotion(found.get(StageName("promotion", n)))) and not each.promoted}
    result = max(evaluated.keys() - refused, default=None)
    examples = {n: read_examples(stage, "examples") for n, stage in evaluated.items()}
    failures = read_examples(evaluated[result], "failures") if result is not None else []
    shown = {each.item_id for each in [*failures, *(examples[result] if result is not None else [])]}
    return RunSummary(
        name=record.get("name", ""),
        path=without_credentials(run.path),
        command=record.get("command", ""),
        config=config,
        versions=record.get("versions", {}),
        catalogue=record.get("catalogue", {}),
        primary_protocol=config.get("evaluation", {}).get("primary_protocol", ""),
        variants=_variants(found, [each.number for each in rounds]),
        rounds=rounds,
        refused=refused,
        result=result,
        baseline_log=_log(found.get(StageName("baseline"))),
        distill_log=_log(found.get(StageName("distill"))),
        examples=examples,
        failures=failures,
        generated=attributes_by_round(found, shown, refused),
        rollouts={n: prompts for n in numbers if (prompts := read_rollouts(found.get(StageName("rar", n))))},
        attachments=read_attachments(run),
        stages=[StageCost(s.name, s.seconds, s.peak_memory_mb, s.name in stale) for s in found.values()],
    )


def _variants(found: Mapping[StageName, Stage], numbers: list[int]) -> list[Variant]:
    variants = []
    if (baselines := found.get(StageName("baselines"))) is not None:
        untrained = baselines.metrics
        variants = [
            Variant(name, None, baselines.name, False, _protocols(untrained.get(name, {})))
            for name in ("chance", "pixels")
        ]
    measured = [(f"round {n}", StageName("evaluate", n)) for n in numbers]
    if (baseline := StageName("evaluate-baseline")) in found:
        measured.insert(0, ("baseline", baseline))
    for name, stage in measured:
        metrics = found[stage].metrics if stage in found else {}
        protocols = _protocols(metrics.get("protocols", {}))
        variants.append(Variant(name, stage.round, str(stage), True, protocols, _sizes(metrics.get("attributes"))))
    return variants


def _protocols(records: dict[str, Any]) -> dict[str, ProtocolResult]:
    return {
        name: ProtocolResult(
            kind=record.get("kind", "retrieval"),
            queries=record.get("queries"),
            gallery=record.get("gallery"),
            metrics={metric: Estimate.of(value) for metric, value in record.get("metrics", {}).items()},
        )
        for name, record in records.items()
    }


def _round(found: Mapping[StageName, Stage], number: int) -> Round:
    attributes, agcl, rar = (found.get(StageName(kind, number)) for kind in ("attributes", "agcl", "rar"))
    return Round(
        number=number,
        attributes=_sizes(attributes.metrics) if attributes is not None else None,
        agcl=agcl.metrics if agcl is not None else {},
        rar=rar.metrics if rar is not None else {},
        agcl_log=_log(agcl),
        rar_log=_log(rar),
        promotion=_promotion(found.get(StageName("promotion", number))),
    )


def _promotion(stage: Stage | None) -> Promotion | None:
    if stage is None:
        return None
    gain = Estimate.of(stage.metrics["gain"]) if "gain" in stage.metrics else None
    return Promotion(stage.metrics["promoted"], stage.metrics["why"], gain)


def _sizes(metrics: dict[str, Any] | None) -> AttributeSizes | None:
    if not metrics:
        return None
    found = metrics.get("quality") or {}
    return AttributeSizes(
        mean_pairs=finite(metrics.get("mean_pairs")),
        mean_words=finite(metrics.get("mean_words")),
        invalid_fraction=finite(metrics.get("invalid_fraction")),
        precision=finite(found.get("precision")),
        recall=finite(found.get("recall")),
        f1=finite(found.get("f1")),
        names={name: fractions["written"] for name, fractions in found.get("names", {}).items()},
    )


def _log(stage: Stage | None) -> Log:
    return read_metrics(storage.join(stage.directory, "log")) if stage is not None else []
