"""What a run directory says about a run, as typed values; reads only what is committed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from afmrl_ray import storage
from afmrl_ray.cit.stages import RunDirectory, Stage
from afmrl_ray.errors import StorageError
from afmrl_ray.report.estimate import Estimate, finite
from afmrl_ray.report.examples import Example, Written, read_examples, written_by_round
from afmrl_ray.report.ladder import LADDER, LadderSummary, read_ladder
from afmrl_ray.training.metrics_log import read_metrics

_ROUND = re.compile(r"-r(\d+)$")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")

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
    """Attributes of a table of listings.

    Attributes:
        mean_pairs: of the valid ones.
        mean_words: of the valid ones.
        invalid_share: share of invalid ones.
        precision: share of pairs that the catalogue has too, over listings that are never trained on.
        recall: share of the catalogue's pairs that are among them.
        f1: of both.
        names: share of those listings that have an attribute name, by name.
    """

    mean_pairs: float | None
    mean_words: float | None
    invalid_share: float | None
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
    """Whether a round was promoted, why not, and what it gained on the round before in the headline's hit@1."""

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
    """Seconds and peak memory (MiB) of a stage; `outdated` says that the next run of the command runs it again."""

    name: str
    seconds: float
    peak_memory_mb: float
    outdated: bool


@dataclass(frozen=True)
class RunSummary:
    """Everything that the tables, plots and pages of a run show."""

    name: str
    path: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    catalogue: dict[str, Any]
    headline: str
    rungs: list[Rung]
    rounds: list[Round]
    baseline_log: Log
    distill_log: Log
    examples: dict[int, list[Example]]
    failures: list[Example]
    written: Written
    ladder: LadderSummary | None
    stages: list[StageCost]

    @property
    def protocols(self) -> list[str]:
        """Names of the protocols measured, the headline first."""
        names = list(dict.fromkeys(name for rung in self.rungs for name in rung.protocols))
        return sorted(names, key=lambda name: name != self.headline)

    @property
    def outdated(self) -> set[str]:
        return {stage.name for stage in self.stages if stage.outdated}

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_memory_mb(self) -> float:
        return max((stage.peak_memory_mb for stage in self.stages), default=0.0)


def collect(run: RunDirectory) -> RunSummary:
    """Read a run, finished or not.

    Raises:
        StorageError: there is no run at that path.
    """
    if not storage.exists(storage.join(run.path, "run.json")):
        raise StorageError(f"{run.path}: no run.json, so no run to report on; check run.storage_path and run.name")
    record = _without_credentials(run.read_run())
    config = record.get("config", {})
    found = {stage.name: stage for stage in run.stages()}
    inputs = {name: stage.inputs for name, stage in found.items()}
    numbers = sorted({int(match[1]) for name in found if (match := _ROUND.search(name))})
    # The attributes written after the last RAR are no round of their own.
    rounds = [each for each in (_round(found, number) for number in numbers) if each.number == 0 or each.agcl]
    evaluated = {n: found[f"evaluate-r{n}"] for n in numbers if f"evaluate-r{n}" in found}
    examples = {n: read_examples(stage, "examples") for n, stage in evaluated.items()}
    failures = read_examples(evaluated[max(evaluated)], "failures") if evaluated else []
    shown = {each.item_id for each in [*failures, *(examples[max(examples)] if examples else [])]}
    return RunSummary(
        name=record.get("name", ""),
        path=_without_credentials(run.path),
        command=record.get("command", ""),
        config=config,
        versions=record.get("versions", {}),
        catalogue=record.get("catalogue", {}),
        headline=config.get("evaluation", {}).get("headline", ""),
        rungs=_rungs(found, [each.number for each in rounds]),
        rounds=rounds,
        baseline_log=_log(found.get("baseline")),
        distill_log=_log(found.get("distill")),
        examples=examples,
        failures=failures,
        written=written_by_round(found, shown),
        ladder=_ladder(run),
        stages=[
            StageCost(name, stage.seconds, stage.peak_memory_mb, is_outdated(name, found, inputs, config))
            for name, stage in found.items()
        ],
    )


def _ladder(run: RunDirectory) -> LadderSummary | None:
    path = storage.join(run.path, LADDER)
    return read_ladder(storage.read_json(path)) if storage.exists(path) else None


def is_outdated(name: str, found: dict[str, Stage], inputs: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a stage was made with settings other than the run's, or stands on a stage that has since changed.

    Args:
        found: committed stages by name.
        inputs: what each was run with.
        config: the run's config.
    """
    own = inputs[name]
    config = _changed(config, own.get("changes", {}))
    settings = {**own.get("config", {}), **({"run": {"seed": own["seed"]}} if "seed" in own else {})}
    if not _agree(settings, config):
        return True
    return any(
        found[above].fingerprint != fingerprint or is_outdated(above, found, inputs, config)
        for above, fingerprint in own.get("upstream", {}).items()
        if above in found
    )


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config's JSON values with those at dotted keys changed, as `Pipeline.variant` changes them."""
    changed = dict(config)
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        inner = changed.get(section)
        changed[section] = _changed(inner if isinstance(inner, dict) else {}, {rest: value}) if rest else value
    return changed


def _agree(part: Any, whole: Any) -> bool:
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and _agree(value, whole[key]) for key, value in part.items())
    return part == whole


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
        invalid_share=finite(metrics.get("invalid_share")),
        precision=finite(found.get("precision")),
        recall=finite(found.get("recall")),
        f1=finite(found.get("f1")),
        names={name: share["written"] for name, share in found.get("names", {}).items()},
    )


def _log(stage: Stage | None) -> Log:
    return read_metrics(storage.join(stage.directory, "log")) if stage is not None else []


def _without_credentials(value: Any) -> Any:
    """The same JSON value without user names and passwords in URIs, since reports are handed around."""
    if isinstance(value, dict):
        return {key: _without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_credentials(inner) for inner in value]
    return _CREDENTIALS.sub("***@", value) if isinstance(value, str) else value
