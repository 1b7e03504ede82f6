"""A measured number with its interval, as all tables and plots take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; none where it was not measured or is not finite."""

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
        return self.low is not None and self.high is not None


def finite(value: Any) -> float | None:
    """The number, or none for what JSON has no word for."""
    # NaN and infinity are no JSON, and `x - x` is 0 for everything else.
    return float(value) if value is not None and value - value == 0 else None
