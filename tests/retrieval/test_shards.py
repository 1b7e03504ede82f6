"""Ranks and log-probabilities from shards equal those of the whole gallery."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_ray.retrieval import ranking, scores, shards
from afmrl_ray.retrieval.ranking import Ranking, rank_gallery
from afmrl_ray.retrieval.shards import (
    Comparison,
    GalleryShard,
    Positives,
    merged,
    positive_log_probabilities,
    ranking_of,
)
from tests.retrieval.test_ranking import _problem

torch.set_num_threads(1)


def compared(
    p: dict, owner: np.ndarray, count: int, left_out: dict | None = None, temperature: float = 0.05
) -> tuple[Positives, list[Comparison]]:
    """Compare with the gallery's items spread over shards; `owner` [N] is each item's shard."""
    parts = [
        GalleryShard(*(p[f"gallery{what}"][owner == shard] for what in ("", "_rows", "_labels", "_order")), left_out)
        for shard in range(count)
    ]
    found = merged([part.positives(p["queries"], p["query_rows"], p["query_labels"]) for part in parts])
    return found, [part.compare(p["queries"], p["query_rows"], found, temperature=temperature) for part in parts]


def rank_by_shards(p: dict, owner: np.ndarray, count: int, left_out: dict | None = None) -> Ranking:
    return ranking_of(p["query_rows"], *compared(p, owner, count, left_out))


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


def by_torch(p: dict, temperature: float, left_out: dict | None = None) -> np.ndarray:
    """Log-probabilities of the positives by a masked log-softmax over the whole gallery in float64."""
    scores = torch.from_numpy(p["queries"]).double() @ torch.from_numpy(p["gallery"]).double().T
    for score, row in zip(scores, p["query_rows"], strict=True):
        score[np.isin(p["gallery_rows"], [row, *(left_out or {}).get(int(row), ())])] = -torch.inf
    labels = p["query_labels"][:, None]
    right = torch.from_numpy((labels == p["gallery_labels"]) & (labels >= 0))
    return torch.log_softmax(scores / temperature, 1).masked_fill(~right, -torch.inf).logsumexp(1).numpy()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 6),
    gallery=st.integers(4, 150),
    temperature=st.sampled_from([0.01, 0.05, 1.0]),
)
def test_log_probabilities_are_those_of_a_softmax_over_the_whole_gallery(seed, count, gallery, temperature):
    """Some shards are empty, and some queries have no positive."""
    problem = _problem(seed, queries=12, gallery=gallery, dim=16)
    owner = np.random.default_rng(seed).integers(0, count, gallery)
    positives, comparisons = compared(problem, owner, count, temperature=temperature)
    found = positive_log_probabilities(positives, comparisons, temperature=temperature)
    asked = np.diff(positives.offsets) > 0
    assert np.isnan(found[~asked]).all()
    np.testing.assert_allclose(found[asked], by_torch(problem, temperature)[asked], atol=2e-6 / temperature)
    assert (found[asked] <= 1e-12).all()
    whole, total = compared(problem, np.zeros(gallery), 1, temperature=temperature)
    unsharded = positive_log_probabilities(whole, total, temperature=temperature)
    np.testing.assert_allclose(found, unsharded, rtol=1e-13, atol=1e-12)


def test_log_probabilities_neither_overflow_nor_vanish():
    """At a temperature of 1e-3, scores of 1 and -1 are 2000 nats apart."""
    gallery = np.array([[1, 0], [-1, 0], [-1, 0]], dtype=np.float32)
    problem = {
        "queries": np.array([[1, 0], [-1, 0]], dtype=np.float32), "query_rows": np.array([7, 8]),
        "query_labels": np.array([1, 1]), "gallery": gallery, "gallery_rows": np.arange(3),
        "gallery_labels": np.array([0, 1, 1]), "gallery_order": np.arange(3),
    }  # fmt: skip
    for owner, count in ((np.zeros(3), 1), (np.array([0, 1, 2]), 3)):
        found = positive_log_probabilities(*compared(problem, owner, count, temperature=1e-3), temperature=1e-3)
        np.testing.assert_allclose(found, [-2000 + np.log(2), 0], rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 4), gallery=st.integers(20, 120))
def test_items_left_out_for_a_query_are_as_if_the_gallery_lacked_them(seed, count, gallery):
    problem = _problem(seed, queries=12, gallery=gallery, dim=4, values=3)
    draw = np.random.default_rng(seed)
    # Distinct queries, so that each has items of its own that are left out; also rows that the gallery lacks.
    left_out = {}
    for row, label in zip(problem["query_rows"].tolist(), problem["query_labels"], strict=True):
        others = problem["gallery_rows"][problem["gallery_labels"] != label] if label >= 0 else problem["gallery_rows"]
        others = others[others != row]
        left_out[row] = np.append(draw.choice(others, size=min(len(others), 5), replace=False), 10_000)
    del left_out[int(problem["query_rows"][0])]
    owner = draw.integers(0, count, gallery)
    positives, comparisons = compared(problem, owner, count, left_out)
    found = positive_log_probabilities(positives, comparisons, temperature=0.05)
    np.testing.assert_allclose(
        found[np.diff(positives.offsets) > 0],
        by_torch(problem, 0.05, left_out)[np.diff(positives.offsets) > 0],
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip
    ranking = ranking_of(problem["query_rows"], positives, comparisons)
    single = ("queries", "query_rows", "query_labels")
    kept = [place for place in range(12) if np.diff(positives.offsets)[place]]
    for place, query in enumerate(kept):
        row = int(problem["query_rows"][query])
        inside = ~np.isin(problem["gallery_rows"], left_out.get(row, ()))
        smaller = {name: value[[query]] if name in single else value[inside] for name, value in problem.items()}
        alone = rank_gallery(**smaller, depth=1)
        np.testing.assert_array_equal(ranking.ranks[ranking.offsets[place] : ranking.offsets[place + 1]], alone.ranks)
        assert ranking.candidates[place] == alone.candidates[0]
