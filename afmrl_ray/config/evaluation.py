"""Settings of the protocols by which a round is judged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.cluster import PoolConfig
from afmrl_ray.config.train import Enriched


class RetrievalProtocol(Section):
    """Queries search a gallery; positives share `label` with the query."""

    kind: Literal["retrieval"] = "retrieval"
    """Discriminates the protocols."""
    name: str
    """Name in tables."""
    query: ItemSelector = ItemSelector(role="query")
    """Rows that search."""
    gallery: ItemSelector = ItemSelector(role="gallery")
    """Rows that are searched; a query's own row is excluded."""
    label: str = "product_id"
    """Column whose equality makes a positive."""
    with_attributes: Enriched = "both"
    """Which sides are shown to the encoder with attributes."""
    ks: tuple[PositiveInt, ...] = Field((1, 5, 10), min_length=1)
    """Depths of hit@k and recall@k."""
    map_k: int = Field(10, gt=0)
    """Depth of mean average precision."""


class LabelProtocol(Section):
    """Classification (linear probe, nearest neighbours) and clustering (k-means) of embeddings by a label."""

    kind: Literal["labels"] = "labels"
    """Discriminates the protocols."""
    name: str
    """Name in tables."""
    fit: ItemSelector = ItemSelector(split=("train",))
    """Rows on which the probe is fitted."""
    test: ItemSelector = ItemSelector(split=("test",))
    """Rows that are classified and clustered."""
    label: str = "category"
    """Column that holds the class."""
    with_attributes: bool = True
    """Whether rows are shown to the encoder with attributes."""
    neighbours: int = Field(5, gt=0)
    """Neighbours that vote."""


Protocol = Annotated[RetrievalProtocol | LabelProtocol, Field(discriminator="kind")]


class EvaluationConfig(Section):
    """What every round is measured by."""

    protocols: tuple[Protocol, ...] = (
        RetrievalProtocol(name="fine"),
        LabelProtocol(name="labels"),
    )
    """Protocols in the order of the report."""
    primary_protocol: str = "fine"
    """Retrieval protocol whose numbers stand first."""
    bootstrap_samples: int = Field(1000, gt=0)
    """Resamples for the 95 % intervals."""
    pool: PoolConfig = PoolConfig(batch_size=128)
    """Ray Data actors that embed."""

    @model_validator(mode="after")
    def _names(self) -> EvaluationConfig:
        names = [protocol.name for protocol in self.protocols]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"evaluation.protocols: {twice[0]!r} names two protocols; give each a name of its own")
        retrieval = [protocol.name for protocol in self.protocols if protocol.kind == "retrieval"]
        if self.primary_protocol not in retrieval:
            raise ValueError(
                f"evaluation.primary_protocol {self.primary_protocol!r} is not a retrieval protocol; there are: "
                f"{', '.join(retrieval)}"
            )
        return self
