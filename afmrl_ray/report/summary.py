"""The committed results of a run as typed values. Fractions are between 0 and 1, times in seconds, memory in MiB."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from afmrl_ray.report.attachment import Attachment
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.examples import Example, GeneratedAttributes
from afmrl_ray.report.rollouts import SampledPrompt

Log = list[dict[str, Any]]
"""One record per training step, with the keys that the training logged."""


@dataclass(frozen=True)
class ProtocolResult:
    """Metrics of one evaluation protocol; counts are None where the stage records none."""

    kind: str
    queries: int | None
    gallery: int | None
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class AttributeSizes:
    """Size and quality of the attributes of a set of items.

    Attributes:
        mean_pairs: name-value pairs per item, over valid outputs.
        mean_words: words per item, over valid outputs.
        invalid_fraction: fraction of invalid outputs.
        precision: fraction of generated pairs that the catalogue has too, over items that are never trained on.
        recall: fraction of the catalogue's pairs that were generated, over the same items.
        f1: harmonic mean of precision and recall.
        names: fraction of those items that have an attribute, by attribute name.
    """

    mean_pairs: float | None
    mean_words: float | None
    invalid_fraction: float | None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    names: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One column of the results table: an untrained baseline, the encoder without attributes, or a round.

    Attributes:
        name: `chance`, `pixels`, `baseline` or `round r`.
        number: the round, or None.
        stage: the stage that measures it; if that is not committed yet, `protocols` is empty.
        trained: whether an encoder was trained; False for `chance` and `pixels`.
    """

    name: str
    number: int | None
    stage: str
    trained: bool
    protocols: dict[str, ProtocolResult]
    attributes: AttributeSizes | None = None


@dataclass(frozen=True)
class Promotion:
    """Whether a round was promoted, the reasons if not, and its gain in hit@1 of `cit.selection_protocol`."""

    promoted: bool
    why: list[str]
    gain: Estimate | None


@dataclass(frozen=True)
class Round:
    """Metrics and logs of a round's trainings; empty or None where the stage is not committed.

    Attributes:
        attributes: attributes of the generator before this round's RAR.
        agcl: metrics of the AGCL stage.
        rar: metrics of the RAR stage.
        promotion: the promotion decision.
    """

    number: int
    attributes: AttributeSizes | None
    agcl: dict[str, float]
    rar: dict[str, Any]
    agcl_log: Log
    rar_log: Log
    promotion: Promotion | None = None

    def reward(self, name: str) -> Estimate | None:
        """A metric of the RAR stage, e.g. a held-out or training reward; None if it was not recorded."""
        return Estimate.of(self.rar[name]) if name in self.rar else None


@dataclass(frozen=True)
class StageCost:
    """Cost of a stage.

    Attributes:
        seconds: wall-clock time of the committed attempt.
        peak_memory_mb: MiB; None where it was not measured.
        stale: whether the next run of the same command runs the stage again.
    """

    name: str
    seconds: float
    peak_memory_mb: float | None
    stale: bool


@dataclass(frozen=True)
class RunSummary:
    """All data of the tables, plots and pages of a run.

    Attributes:
        refused: rounds that were not promoted.
        result: the last evaluated round that was not refused, or None.
        examples: example queries by round.
        failures: queries of `result` whose first positive has the worst rank.
        generated: attribute texts of the shown queries, by item and generator.
        rollouts: completions of the first and last step of each round's RAR whose rollouts were written.
        attachments: results that experiments attached to the run.
    """

    name: str
    path: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    catalogue: dict[str, Any]
    primary_protocol: str
    variants: list[Variant]
    rounds: list[Round]
    refused: set[int]
    result: int | None
    baseline_log: Log
    distill_log: Log
    examples: dict[int, list[Example]]
    failures: list[Example]
    generated: GeneratedAttributes
    rollouts: dict[int, list[SampledPrompt]]
    attachments: list[Attachment]
    stages: list[StageCost]

    @property
    def protocols(self) -> list[str]:
        """Names of the measured protocols, the primary protocol first."""
        names = list(dict.fromkeys(name for variant in self.variants for name in variant.protocols))
        return sorted(names, key=lambda name: name != self.primary_protocol)

    @property
    def selection_protocol(self) -> str:
        """The protocol whose hit@1 decides promotions."""
        return self.config.get("cit", {}).get("selection_protocol") or self.primary_protocol

    @property
    def stale(self) -> set[str]:
        """Names of the stages that the next run of the same command runs again."""
        return {stage.name for stage in self.stages if stage.stale}

    @property
    def seconds(self) -> float:
        """Total wall-clock time of the committed stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_memory_mb(self) -> float | None:
        """Maximum over the stages that were measured; None if none was."""
        return max((stage.peak_memory_mb for stage in self.stages if stage.peak_memory_mb is not None), default=None)
