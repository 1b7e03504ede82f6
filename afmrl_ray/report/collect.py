"""Reads the committed stages of a run directory into a `RunSummary`."""

from __future__ import annotations

import re
from typing import Any

from afmrl_ray import storage
from afmrl_ray.cit.stale import stale_stages
from afmrl_ray.errors import StorageError
from afmrl_ray.redact import without_credentials
from afmrl_ray.report.attachment import read_attachments
from afmrl_ray.report.estimate import Estimate, finite
from afmrl_ray.report.examples import attributes_by_round, read_examples
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
from afmrl_ray.runs import RunDirectory, Stage
from afmrl_ray.training.metrics_log import read_metrics

_ROUND = re.compile(r"-r(\d+)$")


def collect(run: RunDirectory) -> RunSummary:
    """Read a run, finished or not.

    Raises:
        StorageError: the path holds no run.
    """
    if not storage.exists(storage.join(run.path, "run.json")):
        raise StorageError(f"{run.path}: no run.json, so no run to report on; check run.storage_path and run.name")
    recorded = run.read_run()
    found = {stage.name: stage for stage in run.stages()}
    # Fingerprints were computed with the credentials in place.
    stale = stale_stages(list(found.values()), recorded.get("config", {}))
    record = without_credentials(recorded)
    config = record.get("config", {})
    numbers = sorted({int(match[1]) for name in found if (match := _ROUND.search(name))})
    # The attributes written after the last RAR are not a round of their own.
    rounds = [each for each in (_round(found, number) for number in numbers) if each.number == 0 or each.agcl]
    evaluated = {n: found[f"evaluate-r{n}"] for n in numbers if f"evaluate-r{n}" in found}
    refused = {n for n in numbers if (each := _promotion(found.get(f"promotion-r{n}"))) and not each.promoted}
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
        baseline_log=_log(found.get("baseline")),
        distill_log=_log(found.get("distill")),
        examples=examples,
        failures=failures,
        generated=attributes_by_round(found, shown, refused),
        attachments=read_attachments(run),
        stages=[StageCost(name, stage.seconds, stage.peak_memory_mb, name in stale) for name, stage in found.items()],
    )


def _variants(found: dict[str, Stage], numbers: list[int]) -> list[Variant]:
    variants = []
    if "baselines" in found:
        untrained = found["baselines"].metrics
        variants = [
            Variant(name, None, "baselines", False, _protocols(untrained.get(name, {})))
            for name in ("chance", "pixels")
        ]
    measured: list[tuple[str, int | None, str]] = [(f"round {n}", n, f"evaluate-r{n}") for n in numbers]
    if "evaluate-baseline" in found:
        measured.insert(0, ("baseline", None, "evaluate-baseline"))
    for name, number, stage in measured:
        metrics = found[stage].metrics if stage in found else {}
        protocols = _protocols(metrics.get("protocols", {}))
        variants.append(Variant(name, number, stage, True, protocols, _sizes(metrics.get("attributes"))))
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


def _round(found: dict[str, Stage], number: int) -> Round:
    attributes, agcl, rar = (found.get(f"{kind}-r{number}") for kind in ("attributes", "agcl", "rar"))
    return Round(
        number=number,
        attributes=_sizes(attributes.metrics) if attributes is not None else None,
        agcl=agcl.metrics if agcl is not None else {},
        rar=rar.metrics if rar is not None else {},
        agcl_log=_log(agcl),
        rar_log=_log(rar),
        promotion=_promotion(found.get(f"promotion-r{number}")),
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
