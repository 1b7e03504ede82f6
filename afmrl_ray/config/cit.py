"""Settings of the driver that alternates the two trainings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import SideConfig
from afmrl_ray.config.cluster import PoolConfig


class AnnotateConfig(Section):
    """Attributes written by the generator for whole sides of the catalogue."""

    items: SideConfig = SideConfig(split=("train", "val", "test", "gallery"))
    """Listings that get attributes."""
    pool: PoolConfig = PoolConfig()
    """Ray Data actors that generate."""


class CITConfig(Section):
    """Cyclic iterative training."""

    rounds: int = Field(2, ge=1)
    """Rounds of attributes, AGCL, gallery, RAR and evaluation."""
    baseline: bool = False
    """Whether plain InfoNCE without weights, mask and attributes is trained and measured first."""
    encoder_start: Literal["base", "previous"] = "previous"
    """Whether a round's encoder starts from the backbone or from the round before."""
