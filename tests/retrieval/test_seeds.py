"""Means over seeds and paired gains equal independent references."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from afmrl_ray.retrieval.seeds import over_seeds, paired_gain_over_seeds


def test_the_interval_over_seeds_equals_that_of_a_t_test():
    values = [0.41, 0.44, 0.39, 0.47, 0.43]
    found = over_seeds(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.mean == pytest.approx(np.mean(values))


def test_a_single_seed_has_no_interval_and_no_seed_is_an_error():
    assert over_seeds([0.5]).low is None
    with pytest.raises(ValueError, match="no seed"):
        over_seeds([])


def test_the_paired_gain_equals_a_bootstrap_written_out():
    draw = np.random.default_rng(3)
    before = (draw.random((4, 300)) < 0.4).astype(np.float32)
    after = np.where(draw.random((4, 300)) < 0.1, 1.0, before)
    found = paired_gain_over_seeds(before, after, samples=4000, seed=0)
    by_t = over_seeds((after - before).mean(axis=1).tolist())
    means = []
    for _ in range(4000):
        seeds, queries = draw.integers(4, size=4), draw.integers(300, size=300)
        means.append((after - before)[np.ix_(seeds, queries)].mean())
    assert found.mean == pytest.approx((after - before).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    # The spread over queries dominates here, so the bootstrap interval is the wider one.
    assert low < by_t.low < by_t.high < high
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_covers_the_true_gain_with_few_seeds_that_differ(seeds):
    """Gains by seed are normal with mean 0.1; a bootstrap of three seeds alone covers it in three of four trials."""
    draw, held = np.random.default_rng(5), []
    for _ in range(300):
        gains = np.tile(0.1 + 0.05 * draw.standard_normal((seeds, 1)), (1, 40))
        found = paired_gain_over_seeds(np.zeros_like(gains), gains, samples=200, seed=0)
        held.append(found.low <= 0.1 <= found.high)
    assert np.mean(held) > 0.92


def test_the_interval_of_a_single_seed_is_over_queries():
    before, after = np.zeros((1, 400)), (np.arange(400) % 4 == 0).astype(float)[None]
    found = paired_gain_over_seeds(before, after, samples=2000, seed=0)
    error = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (found.low, found.high) == pytest.approx((0.25 - error, 0.25 + error), abs=0.006)


def test_pairing_by_query_narrows_the_interval():
    """Queries that are hard for both variants carry no information about the gain; unpaired they would hide it."""
    draw = np.random.default_rng(0)
    hard = draw.random(400) < 0.5
    before = np.tile(hard, (3, 1)).astype(float)
    after = before.copy()
    after[:, ~hard] = draw.random((3, int((~hard).sum()))) < 0.1
    paired = paired_gain_over_seeds(before, after, samples=2000, seed=0)
    shuffled = paired_gain_over_seeds(before[:, draw.permutation(400)], after, samples=2000, seed=0)
    assert paired.low > 0
    assert shuffled.high - shuffled.low > 1.5 * (paired.high - paired.low)


def test_seeds_that_disagree_widen_the_interval():
    before = np.zeros((4, 500))
    agree, disagree = np.zeros((4, 500)), np.zeros((4, 500))
    agree[:, ::10] = 1
    disagree[0, :200] = 1
    assert agree.mean() == disagree.mean()
    narrow, wide = (paired_gain_over_seeds(before, after, samples=2000, seed=0) for after in (agree, disagree))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert narrow.low > 0 >= wide.low


def test_unequal_shapes_are_an_error():
    with pytest.raises(ValueError, match="no pairs"):
        paired_gain_over_seeds(np.zeros((2, 3)), np.zeros((2, 4)), samples=10, seed=0)
