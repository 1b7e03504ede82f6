"""Settings of the evaluation protocols."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.cluster import PoolConfig


class RetrievalProtocol(Section):
    """Retrieval: queries search a gallery, whose positives have the query's value in column `label`."""

    kind: Literal["retrieval"] = "retrieval"
    """Kind of the protocol."""
    name: str
    """Name of the protocol, unique."""
    query: ItemSelector = ItemSelector(role="query")
    """Items that are queries."""
    gallery: ItemSelector = ItemSelector(role="gallery")
    """Items that are searched; a query's own item is excluded."""
    label: str = "product_id"
    """Column in which positives have the same value as the query."""
    within: str | None = None
    """Column that limits a query's search to gallery items with its own value, as `family_id` for the choice between
    near-identical products; none = the whole gallery."""
    with_attributes: Literal["none", "query", "both"] = "both"
    """Which items are embedded with their attributes: none, the queries, or queries and gallery."""
    ks: tuple[PositiveInt, ...] = Field((1, 5, 10), min_length=1)
    """Values of k for hit@k and recall@k."""
    map_k: int = Field(10, gt=0)
    """Value of k for mean average precision."""


class LabelProtocol(Section):
    """Classification (linear probe, nearest neighbours) and clustering (k-means) of embeddings by a label."""

    kind: Literal["labels"] = "labels"
    """Kind of the protocol."""
    name: str
    """Name of the protocol, unique."""
    fit: ItemSelector = ItemSelector(split=("train",))
    """Items that probe and nearest neighbours are fitted on."""
    test: ItemSelector = ItemSelector(split=("test",))
    """Items that are classified and clustered."""
    label: str = "category"
    """Column with the class."""
    with_attributes: bool = True
    """Whether items are embedded with their attributes."""
    neighbours: int = Field(5, gt=0)
    """Number of nearest neighbours of the classifier."""


Protocol = Annotated[RetrievalProtocol | LabelProtocol, Field(discriminator="kind")]


class EvaluationConfig(Section):
    """Evaluation of every round."""

    protocols: tuple[Protocol, ...] = (
        RetrievalProtocol(name="fine"),
        LabelProtocol(name="labels"),
    )
    """Protocols in the order of the report."""
    primary_protocol: str = "fine"
    """Retrieval protocol that is reported first, and that decides where no other is set."""
    bootstrap_samples: int = Field(1000, gt=0)
    """Number of bootstrap resamples for 95 % intervals."""
    pool: PoolConfig = PoolConfig(batch_size=128)
    """Ray Data actors of the encoder."""

    @model_validator(mode="after")
    def _names(self) -> EvaluationConfig:
        names = [protocol.name for protocol in self.protocols]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"evaluation.protocols: {twice[0]!r} names two protocols; names must be unique")
        retrieval = [protocol.name for protocol in self.protocols if protocol.kind == "retrieval"]
        if self.primary_protocol not in retrieval:
            raise ValueError(
                f"evaluation.primary_protocol {self.primary_protocol!r} is not a retrieval protocol; "
                f"retrieval protocols: {', '.join(retrieval)}"
            )
        return self
