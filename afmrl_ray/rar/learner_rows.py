"""Rows of a learner's batch: mini-batches by a condition, micro-batches as slices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afmrl_ray.rar.module import WEIGHT


@dataclass(frozen=True)
class Microbatch:
    """Consecutive rows of a learner's batch.

    Attributes:
        rows: the rows.
        counts: False for a repeat with weight 0, which gives this learner as many micro-batches as the others have.
    """

    rows: slice
    counts: bool = True

    def of(self, columns: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Its rows of all columns, on a device."""
        part = {name: value[self.rows].to(device) for name, value in columns.items()}
        return part if self.counts else {**part, WEIGHT: torch.zeros_like(part[WEIGHT])}


def select_rows(columns: dict[str, Tensor], wanted: Tensor) -> dict[str, Tensor]:
    """The wanted rows of all columns; one row of weight 0 if there are none, since every learner makes every pass."""
    if bool(wanted.any()):
        return {name: value[wanted] for name, value in columns.items()}
    return {name: torch.zeros_like(value[:1]) if name == WEIGHT else value[:1] for name, value in columns.items()}
