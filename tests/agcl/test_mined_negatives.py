"""Mined negatives against a loop over queries and items."""

from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.agcl.mined_negatives import mine_negatives


def case(seed: int, *, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Items of 12 products, some unknown, near the vectors of their products; every third item is a query too."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(-1, 12, 60)
    vectors = draw.normal(size=(13, 6))[labels] + draw.normal(size=(60, 6)) * 0.5 + shift
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = draw.permutation(200)[:60]
    return {
        "queries": vectors[::3],
        "gallery": vectors[10:],
        "query_rows": rows[::3],
        "gallery_rows": rows[10:],
        "query_labels": labels[::3],
        "gallery_labels": labels[10:],
        "gallery_order": draw.permutation(50),
    }


def by_loop(given: dict[str, np.ndarray], count: int, margin: float) -> list[list[int]]:
    found = []
    for query, row, label in zip(given["queries"], given["query_rows"], given["query_labels"], strict=True):
        items = zip(given["gallery"], given["gallery_rows"], given["gallery_labels"], strict=True)
        scored = [(float(query @ vector), int(other), int(code)) for vector, other, code in items if other != row]
        positives = [score for score, _, code in scored if code == label >= 0]
        limit = min(positives, default=-np.inf)
        limit -= (1 - margin) * abs(limit) if positives else 0
        negatives = sorted(
            ((s, r) for s, r, code in scored if s < limit and (code != label or label < 0)), reverse=True
        )
        found.append([other for _, other in negatives[:count]] if positives else [])
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("margin", [1.0, 0.95, 0.6])
def test_negatives_equal_a_plain_loop(seed: int, margin: float) -> None:
    given = case(seed)
    expected = by_loop(given, 5, margin)
    found = mine_negatives(**given, count=5, margin=margin)
    assert found.shape == (20, 5)
    assert [row[row >= 0].tolist() for row in found] == expected
    assert any(expected)
    assert not all(len(negatives) == 5 for negatives in expected)


def test_a_smaller_margin_leaves_out_the_most_similar_items_and_only_those() -> None:
    given = case(0, shift=1.0)
    wide, narrow = (mine_negatives(**given, count=50, margin=margin) for margin in (1.0, 0.8))
    fewer = 0
    for all_below, kept in zip(wide, narrow, strict=True):
        all_below, kept = all_below[all_below >= 0], kept[kept >= 0]
        assert kept.tolist() == all_below[len(all_below) - len(kept) :].tolist()
        fewer += len(kept) < len(all_below)
    assert fewer > 5


def test_a_dissimilar_positive_moves_the_limit_down_as_a_similar_one_does() -> None:
    """With a positive at -0.4 and margin 0.5, negatives are below -0.6."""
    scores = np.array([-0.4, -0.3, -0.5, -0.7, -0.9])
    gallery = np.stack([scores, np.sqrt(1 - scores**2)], axis=1).astype(np.float32)
    found = mine_negatives(
        np.array([[1.0, 0.0]], dtype=np.float32),
        gallery,
        query_rows=np.array([9]),
        gallery_rows=np.arange(5),
        query_labels=np.array([1]),
        gallery_labels=np.array([1, 2, 3, 4, 5]),
        gallery_order=np.arange(5),
        count=3,
        margin=0.5,
    )
    assert found.tolist() == [[3, 4, -1]]


def test_the_order_of_the_gallery_changes_nothing_even_among_equal_scores() -> None:
    given = case(1)
    given["gallery"][20:30] = given["gallery"][20]
    places = np.random.default_rng(0).permutation(50)
    moved = {name: values[places] if name.startswith("gallery") else values for name, values in given.items()}
    first, second = (mine_negatives(**each, count=8, margin=0.95) for each in (given, moved))
    np.testing.assert_array_equal(first, second)
