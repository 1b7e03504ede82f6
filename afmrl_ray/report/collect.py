"""What a run directory says about a run, as typed values; reads only what is committed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from afmrl_ray import storage
from afmrl_ray.cit.stale import stale_stages
from afmrl_ray.errors import StorageError
from afmrl_ray.redact import without_credentials
from afmrl_ray.report.estimate import Estimate, finite
from afmrl_ray.report.examples import AttributeResult, Example, read_examples, written_by_round
from afmrl_ray.report.ladder import LADDER, LadderSummary, read_ladder
from afmrl_ray.runs import RunDirectory, Stage
from afmrl_ray.training.metrics_log import read_metrics

_ROUND = re.compile(r"-r(\d+)$")

Log = list[dict[str, Any]]
"""One record a step, keys as the training logs them."""


@dataclass(frozen=True)
class ProtocolResult:
    """Metrics of one protocol, shares between 0 and 1; counts are none where the stage gives none."""

    kind: str
    queries: int | None
    gallery: int | None
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class AttributeSizes:
    """Attributes of a table of items.

    Attributes:
        mean_pairs: of the valid ones.
        mean_words: of the valid ones.
        invalid_fraction: share of invalid ones.
        precision: share of pairs that the catalogue has too, over items that are never trained on.
        recall: share of the catalogue's pairs that are among them.
        f1: of both.
        names: share of those items that have an attribute name, by name.
    """

    mean_pairs: float | None
    mean_words: float | None
    invalid_fraction: float | None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    names: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rung:
    """One column of the tables: a floor, the baseline or a round.

    Attributes:
        name: `chance`, `pixels`, `baseline` or `round r`.
        number: the round, or none.
        stage: the stage that measures it; without protocols if that is not committed yet.
        trained: whether it is more than a floor.
    """

    name: str
    number: int | None
    stage: str
    trained: bool
    protocols: dict[str, ProtocolResult]
    attributes: AttributeSizes | None = None


@dataclass(frozen=True)
class Promotion:
    """Whether a round was promoted, why not, and its gain in hit@1 of `cit.selection_protocol` on the last one."""

    promoted: bool
    why: list[str]
    gain: Estimate | None


@dataclass(frozen=True)
class Round:
    """What the trainings of a round logged; empty or none where the stage is not committed.

    Attributes:
        attributes: of the generator before this round's RAR.
        rar: the metrics of the RAR stage.
        promotion: what became of the round.
    """

    number: int
    attributes: AttributeSizes | None
    agcl: dict[str, float]
    rar: dict[str, Any]
    agcl_log: Log
    rar_log: Log
    promotion: Promotion | None = None

    def reward(self, name: str) -> Estimate | None:
        """A held-out or training reward of the RAR."""
        return Estimate.of(self.rar[name]) if name in self.rar else None


@dataclass(frozen=True)
class StageCost:
    """What a stage cost.

    Attributes:
        peak_memory_mb: MiB; none where it was not measured.
        stale: whether the next run of the command runs it again.
    """

    name: str
    seconds: float
    peak_memory_mb: float | None
    stale: bool


@dataclass(frozen=True)
class RunSummary:
    """Everything that the tables, plots and pages of a run show.

    Attributes:
        refused: rounds that were not promoted.
        result: the last evaluated round that was not refused, or none.
        examples: queries by round.
        failures: the worst queries of `result`.
    """

    name: str
    path: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    catalogue: dict[str, Any]
    primary_protocol: str
    rungs: list[Rung]
    rounds: list[Round]
    refused: set[int]
    result: int | None
    baseline_log: Log
    distill_log: Log
    examples: dict[int, list[Example]]
    failures: list[Example]
    written: AttributeResult
    ladder: LadderSummary | None
    stages: list[StageCost]

    @property
    def protocols(self) -> list[str]:
        """Names of the protocols measured, the primary protocol first."""
        names = list(dict.fromkeys(name for rung in self.rungs for name in rung.protocols))
        return sorted(names, key=lambda name: name != self.primary_protocol)

    @property
    def selection_protocol(self) -> str:
        """The protocol whose hit@1 promotions compare."""
        return self.config.get("cit", {}).get("selection_protocol") or self.primary_protocol

    @property
    def stale(self) -> set[str]:
        return {stage.name for stage in self.stages if stage.stale}

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_memory_mb(self) -> float | None:
        """Of the stages that were measured; none where none was."""
        return max((stage.peak_memory_mb for stage in self.stages if stage.peak_memory_mb is not None), default=None)


def collect(run: RunDirectory) -> RunSummary:
    """Read a run, finished or not.

    Raises:
        StorageError: there is no run at that path.
    """
    if not storage.exists(storage.join(run.path, "run.json")):
        raise StorageError(f"{run.path}: no run.json, so no run to report on; check run.storage_path and run.name")
    written = run.read_run()
    found = {stage.name: stage for stage in run.stages()}
    # Stages were made with the addresses as they are.
    stale = stale_stages(list(found.values()), written.get("config", {}))
    record = without_credentials(written)
    config = record.get("config", {})
    numbers = sorted({int(match[1]) for name in found if (match := _ROUND.search(name))})
    # The attributes written after the last RAR are no round of their own.
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
        rungs=_rungs(found, [each.number for each in rounds]),
        rounds=rounds,
        refused=refused,
        result=result,
        baseline_log=_log(found.get("baseline")),
        distill_log=_log(found.get("distill")),
        examples=examples,
        failures=failures,
        written=written_by_round(found, shown, refused),
        ladder=_ladder(run),
        stages=[StageCost(name, stage.seconds, stage.peak_memory_mb, name in stale) for name, stage in found.items()],
    )


def _ladder(run: RunDirectory) -> LadderSummary | None:
    path = storage.join(run.path, LADDER)
    return read_ladder(storage.read_json(path)) if storage.exists(path) else None


def _rungs(found: dict[str, Stage], numbers: list[int]) -> list[Rung]:
    rungs = []
    if "floor" in found:
        floor = found["floor"].metrics
        rungs = [Rung(name, None, "floor", False, _protocols(floor.get(name, {}))) for name in ("chance", "pixels")]
    measured: list[tuple[str, int | None, str]] = [(f"round {n}", n, f"evaluate-r{n}") for n in numbers]
    if "evaluate-baseline" in found:
        measured.insert(0, ("baseline", None, "evaluate-baseline"))
    for name, number, stage in measured:
        metrics = found[stage].metrics if stage in found else {}
        protocols = _protocols(metrics.get("protocols", {}))
        rungs.append(Rung(name, number, stage, True, protocols, _sizes(metrics.get("attributes"))))
    return rungs


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
        names={name: share["written"] for name, share in found.get("names", {}).items()},
    )


def _log(stage: Stage | None) -> Log:
    return read_metrics(storage.join(stage.directory, "log")) if stage is not None else []
