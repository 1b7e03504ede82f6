"""Ranks that shards count together are those of the whole gallery, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_ray.retrieval import ranking, shards, tiles
from afmrl_ray.retrieval.ranking import Ranking, rank_gallery
from afmrl_ray.retrieval.shards import GalleryShard, merged, ranking_of
from tests.retrieval.test_ranking import _problem

torch.set_num_threads(1)


def together(p: dict, owner: np.ndarray, count: int) -> Ranking:
    """Rank with the gallery's rows spread over shards."""
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
)
def test_random_galleries_ties_included(seed, count, gallery, values, tile):
    """Random owners, so that neighbours in the tie order stand in different shards, and some shards are empty.

    Sums of small integers are exact in any tile; real values in tiles of another shape are another kernel's.
    """
    problem = _problem(seed, queries=12, gallery=gallery, dim=4, values=values)
    owner = np.random.default_rng(seed).integers(0, count, gallery)
    shape = (ranking.QUERY_TILE, shards.QUERY_TILE, tiles.GALLERY_TILE)
    ranking.QUERY_TILE = shards.QUERY_TILE = 5
    tiles.GALLERY_TILE = tile
    try:
        assert_same(together(problem, owner, count), rank_gallery(**problem, depth=3))
    finally:
        ranking.QUERY_TILE, shards.QUERY_TILE, tiles.GALLERY_TILE = shape


@pytest.mark.parametrize("dim", [64, 100, 1536])
def test_real_valued_duplicates_over_several_tiles(dim):
    problem = _problem(1, queries=70, gallery=5000, dim=dim)
    problem["query_labels"] = np.arange(70) % 40
    problem["gallery_labels"] = np.arange(5000) % 1000
    owner = np.random.default_rng(0).integers(0, 3, 5000)
    assert_same(together(problem, owner, 3), together(problem, np.zeros(5000), 1))
