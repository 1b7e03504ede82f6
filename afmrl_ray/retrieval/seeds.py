"""Numbers of several seeds folded into one: means with intervals over seeds, and paired gains. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from afmrl_ray.retrieval.evaluate import Value


def over_seeds(values: Sequence[float]) -> Value:
    """Mean and its 95 % interval over seeds (Student's t); no interval from one seed alone.

    Args:
        values: [S] one number a seed.

    Raises:
        ValueError: there are none.
    """
    from scipy import stats

    if not len(values):
        raise ValueError("over_seeds: no seed has a number")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Value(mean)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Value(mean, mean - half, mean + half)


def paired_gain_over_seeds(before: np.ndarray, after: np.ndarray, *, samples: int, seed: int) -> Value:
    """Mean difference with a 95 % interval over seeds and queries at once.

    Every resample of a bootstrap draws seeds, and queries that all drawn seeds and both sides share, so that the
    interval holds what other seeds and other queries would change. A seed is a pair too: both sides begin with the same
    one. Resamples of a few seeds spread too little (three seeds hold the truth in three of four intervals), so where
    Student's t over the seeds' gains reaches further, its interval counts.

    Args:
        before: [S, Q] numbers of one rung by seed and query.
        after: [S, Q] the same of another.
        samples: resamples.
        seed: of the draws.

    Raises:
        ValueError: the shapes differ, or there is nothing.
    """
    if before.shape != after.shape or before.ndim != 2 or not before.size:
        raise ValueError(f"paired_gain_over_seeds: shapes {before.shape} and {after.shape} are no pairs [S, Q]")
    gains = after.astype(np.float64) - before
    draw = np.random.default_rng(seed)
    seeds, queries = gains.shape
    # Counts of a resample are multinomial, so a resample's mean is a product of two count vectors with the gains.
    by_seed = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples) / seeds
    by_query = draw.multinomial(queries, np.full(queries, 1 / queries), size=samples) / queries
    means = np.einsum("bs,sq,bq->b", by_seed, gains, by_query, optimize=True)
    low, high = (float(end) for end in np.percentile(means, [2.5, 97.5]))
    by_t = over_seeds(gains.mean(axis=1).tolist())
    if by_t.low is not None and by_t.high is not None:
        low, high = min(low, by_t.low), max(high, by_t.high)
    return Value(float(gains.mean()), low, high)
