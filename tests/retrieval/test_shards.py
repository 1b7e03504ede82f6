"""Ranks counted by shards equal those of the whole gallery exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_ray.retrieval import ranking, scores, shards
from afmrl_ray.retrieval.ranking import Ranking, rank_gallery
from afmrl_ray.retrieval.shards import GalleryShard, merged, ranking_of
from tests.retrieval.test_ranking import _problem

torch.set_num_threads(1)


def rank_by_shards(p: dict, owner: np.ndarray, count: int) -> Ranking:
    """Rank with the gallery's items spread over shards; `owner` [N] is each item's shard."""
    parts = [
        GalleryShard(*(p[f"gallery{what}"][owner == shard] for what in ("", "_rows", "_labels", "_order")))
        for shard in range(count)
    ]
    found = merged([part.positives(p["queries"], p["query_rows"], p["query_labels"]) for part in parts])
    counts = [part.count_before(p["queries"], p["query_rows"], found) for part in parts]
    return ranking_of(p["query_rows"], found, counts)


def assert_same(found: Ranking, expected: Ranking) -> None:
    for name in ("query_rows", "excluded", "positives", "candidates", "ranks", "offsets"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 5),
    gallery=st.integers(4, 150),
    values=st.sampled_from([1, 2, 3]),
    tile=st.sampled_from([7, 64, 2048]),
    sort_from=st.sampled_from([1, 100]),
)
def test_random_galleries_with_ties(seed, count, gallery, values, tile, sort_from):
    """Items are assigned at random, so that neighbours in the tie order are in different shards, and some are empty.

    Sums of small integers are exact in any tile; real values in tiles of another shape are another kernel's.
    """
    problem = _problem(seed, queries=12, gallery=gallery, dim=4, values=values)
    owner = np.random.default_rng(seed).integers(0, count, gallery)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "QUERY_TILE", 5)
        patch.setattr(shards, "QUERY_TILE", 5)
        patch.setattr(scores, "GALLERY_TILE", tile)
        patch.setattr(scores, "_SORT_FROM", sort_from)
        assert_same(rank_by_shards(problem, owner, count), rank_gallery(**problem, depth=3))


@pytest.mark.parametrize("dim", [64, 100, 1536])
def test_real_valued_duplicates_over_several_tiles(dim):
    problem = _problem(1, queries=70, gallery=5000, dim=dim)
    problem["query_labels"] = np.arange(70) % 40
    problem["gallery_labels"] = np.arange(5000) % 1000
    owner = np.random.default_rng(0).integers(0, 3, 5000)
    assert_same(rank_by_shards(problem, owner, 3), rank_by_shards(problem, np.zeros(5000), 1))
