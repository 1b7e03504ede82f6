"""Means over queries with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BATCH = 100
"""Resamples drawn at once, which bounds memory."""


@dataclass(frozen=True)
class Value:
    """A metric and its 95 % interval; no interval where the metric is not a mean over queries."""

    mean: float
    low: float | None = None
    high: float | None = None


def interval(values: np.ndarray, *, samples: int, seed: int) -> Value:
    """Mean and its 95 % percentile bootstrap interval (`scipy.stats.bootstrap`).

    Args:
        values: [Q] one number per query (or prompt), at least one.
        samples: number of resamples.
        seed: of the resampling.
    """
    from scipy import stats

    mean = float(values.mean())
    if len(values) == 1:  # scipy refuses it
        return Value(mean, mean, mean)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=samples, batch=_BATCH, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Value(mean, float(found.low), float(found.high))
