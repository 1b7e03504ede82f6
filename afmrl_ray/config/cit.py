"""Settings of the driver of cyclic iterative training, and of its annotation stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.cluster import PoolConfig


class AnnotateConfig(Section):
    """Annotation: attributes that the generator writes for all selected items."""

    items: ItemSelector = ItemSelector(split=("train", "val", "test", "gallery"))
    """Items that are annotated."""
    ground_truth_column: str = "attributes"
    """Column with an item's true attributes; generated attributes are compared with it."""
    pool: PoolConfig = PoolConfig()
    """Ray Data actors of the generator."""


class GateConfig(Section):
    """Promotion gate: how much worse than the last promoted round a round may be (the alignment tax)."""

    protocols: tuple[str, ...] = ()
    """Names of the evaluation protocols that the gate compares; empty = every round is promoted. Promotion selects the
    round that is served, so use protocols with val queries to keep test queries out of the selection."""
    max_loss: float = Field(0.02, ge=0)
    """Largest tolerated decrease of a protocol's metric, as a fraction: hit@1 (retrieval) or probe accuracy (labels). A
    round is rejected if the whole 95 % interval of the paired decrease is above it."""
    strict: bool = False
    """Whether a round is rejected as soon as the mean decrease is above `max_loss`, whatever its interval."""


class CITConfig(Section):
    """Cyclic iterative training."""

    rounds: int = Field(2, ge=1)
    """Largest number of rounds; each has annotation, AGCL, gallery, RAR and evaluation."""
    baseline: bool = False
    """Whether an InfoNCE baseline (no weights, mask or attributes) is trained and evaluated first."""
    init_from: Literal["base", "previous"] = "previous"
    """Initial weights of a round's encoder: the backbone, or the encoder of the round before."""
    train_fraction: float | None = Field(None, gt=0, le=1)
    """Fraction of the products that the encoder trains on after the first round; none = `agcl.train_fraction`."""
    gate: GateConfig = GateConfig()
    """Promotion gate. The run ends after a rejected round; its result is the last promoted round."""
    patience: int | None = Field(None, ge=1)
    """Number of consecutive rounds without improvement after which the run ends; none = all rounds. A round improves if
    the 95 % interval of its paired gain in hit@1 of `selection_protocol` over the round before is above zero."""
    selection_protocol: str = ""
    """Retrieval protocol of `evaluation.protocols` whose hit@1 `patience` compares; empty = the primary protocol. Use
    one with val queries to keep the reported test queries out of the decision."""
