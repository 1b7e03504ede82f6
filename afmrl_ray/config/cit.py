"""Settings of the driver that alternates the two trainings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.cluster import PoolConfig


class AnnotateConfig(Section):
    """Attributes written by the generator for whole sides of the catalogue."""

    items: ItemSelector = ItemSelector(split=("train", "val", "test", "gallery"))
    """Items that get attributes."""
    ground_truth_column: str = "attributes"
    """Column that holds what an item's attributes truly are, by which written ones are judged."""
    pool: PoolConfig = PoolConfig()
    """Ray Data actors that generate."""


class GateConfig(Section):
    """What a round may not lose (the alignment tax): it is measured against the last round that was promoted."""

    protocols: tuple[str, ...] = ()
    """Names of evaluation protocols that are guarded; none = every round is promoted. Which rounds are promoted, and so
    which is served, is chosen on the queries of these protocols: guard ones over val queries to keep the test queries
    out of the choice."""
    max_loss: float = Field(0.02, ge=0)
    """Most that a guarded protocol may lose: of hit@1 in retrieval, of the probe's accuracy with labels. A round is
    refused if the loss is above it for sure, with the whole 95 % interval of the paired difference."""
    strict: bool = False
    """Refuse a round whose mean loss is above `max_loss`, sure or not."""


class CITConfig(Section):
    """Cyclic iterative training."""

    rounds: int = Field(2, ge=1)
    """Rounds of attributes, AGCL, gallery, RAR and evaluation, at most."""
    baseline: bool = False
    """Whether plain InfoNCE without weights, mask and attributes is trained and measured first."""
    init_from: Literal["base", "previous"] = "previous"
    """Whether a round's encoder starts from the backbone or from the round before."""
    train_fraction: float | None = Field(None, gt=0, le=1)
    """Share of the products that rounds after the first train the encoder on; none = `agcl.train_fraction`."""
    gate: GateConfig = GateConfig()
    """Which rounds are promoted. After a round that is refused the run ends, since what it would go on from has been
    tried; its result is the last round that was promoted."""
    patience: int | None = Field(None, ge=1)
    """End after so many rounds in a row whose gain over the last one, in the hit@1 of `selection_protocol`, has an
    interval that includes zero or lies below it; none = all rounds."""
    selection_protocol: str = ""
    """Retrieval protocol of `evaluation.protocols` whose hit@1 says what a round gained, and so when `patience` ends
    the run. A protocol over val queries keeps the test queries out of that choice; empty = the primary protocol
    decides, on the very queries that are reported."""
