"""Results of several seeds combined: means with intervals over seeds, and paired gains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from afmrl_ray.retrieval.bootstrap import Value


def over_seeds(values: Sequence[float]) -> Value:
    """Mean and its 95 % interval over seeds (Student's t); no interval for a single seed.

    Args:
        values: [S] one number per seed.

    Raises:
        ValueError: `values` is empty.
    """
    from scipy import stats

    if not len(values):
        raise ValueError("over_seeds: no seed has a number")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Value(mean)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Value(mean, mean - half, mean + half)


def paired_gain_over_seeds(before: np.ndarray, after: np.ndarray, *, samples: int, seed: int) -> Value:
    """Mean difference with a 95 % interval over seeds and queries at once.

    Every resample draws seeds, and queries that all drawn seeds and both variants share, so the interval covers what
    other seeds and other queries would change. Seeds are paired too: both variants start from the same one. Resampling
    a few seeds underestimates their spread (three seeds cover the truth in three of four intervals), so the interval of
    Student's t over the seeds' gains is used where it reaches further.

    `scipy.stats.bootstrap` resamples one axis, so the crossed resampling is done here.

    Args:
        before: [S, Q] numbers of one variant by seed and query.
        after: [S, Q] numbers of the other variant.
        samples: number of resamples.
        seed: of the resampling.

    Raises:
        ValueError: the shapes differ, or there are no numbers.
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
