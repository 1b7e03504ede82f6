"""Settings of the served index."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import ItemSelector


class IndexConfig(Section):
    """The FAISS index over a gallery's embeddings, built by `jobs/build_index.py`."""

    kind: Literal["auto", "exact", "hnsw", "ivf"] = "auto"
    """`exact` compares a query with every item; `hnsw` and `ivf` with few, and their recall against exact search is
    measured when they are built. `auto` is exact up to `exact_up_to` items, and hnsw above."""
    exact_up_to: int = Field(100_000, ge=0)
    """Most items for which `auto` is exact."""
    hnsw_links: int = Field(32, ge=4)
    """Neighbours of a node of the HNSW graph (M)."""
    hnsw_build: int = Field(200, gt=0)
    """Candidates when a node is inserted (efConstruction)."""
    hnsw_search: int = Field(128, gt=0)
    """Candidates of a search (efSearch)."""
    ivf_lists: int = Field(1024, gt=0)
    """Cells of the IVF index (nlist)."""
    ivf_probes: int = Field(32, gt=0)
    """Cells that a search visits (nprobe)."""
    gallery: ItemSelector | None = None
    """Items that are searched; none = the gallery of the primary protocol."""
    thumbnail_px: int = Field(160, ge=16, le=1024)
    """Longer side of the thumbnails, pixels."""
    recall_queries: int = Field(500, gt=0)
    """Queries with which the recall against exact search is measured."""
