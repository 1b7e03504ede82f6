"""Settings of the index that is served."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import ItemSelector


class IndexConfig(Section):
    """The FAISS index over a gallery's embeddings, built by `jobs/build_index.py`."""

    kind: Literal["auto", "exact", "hnsw", "ivf"] = "auto"
    """`exact` compares a query with every item. `hnsw` and `ivf` compare it with few, and their recall against exact
    is measured when they are built. `auto`: exact up to `exact_up_to` items, then hnsw."""
    exact_up_to: int = Field(100_000, ge=0)
    """Items up to which `auto` stays exact."""
    hnsw_links: int = Field(32, ge=4)
    """Neighbours of a node of the HNSW graph."""
    hnsw_build: int = Field(200, gt=0)
    """Candidates looked at when a node is linked."""
    hnsw_search: int = Field(128, gt=0)
    """Candidates looked at by a search."""
    ivf_lists: int = Field(1024, gt=0)
    """Cells that IVF cuts the items into."""
    ivf_probes: int = Field(32, gt=0)
    """Cells that a search looks into."""
    gallery: ItemSelector | None = None
    """What is searched; none = the gallery of the primary protocol."""
    thumbnail_px: int = Field(160, ge=16, le=1024)
    """Longer side of the images kept for result pages, pixels."""
    recall_queries: int = Field(500, gt=0)
    """Items that are searched for when the recall against exact is measured."""
