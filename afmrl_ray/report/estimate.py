"""A measured value with its confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; None where a value was not measured or is not finite."""

    mean: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: Any) -> Estimate:
        """From a stage's metric: a number, or an object with `mean`, `low` and `high`."""
        if isinstance(value, dict):
            return cls(*(finite(value.get(name)) for name in ("mean", "low", "high")))
        return cls(finite(value))

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known."""
        return self.low is not None and self.high is not None


def finite(value: Any) -> float | None:
    """The number, or None if it is None, NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None
