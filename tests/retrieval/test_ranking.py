"""Ranks equal those of a full sort, and do not depend on the order of items, on other queries or on tile sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from afmrl_ray.retrieval import ranking, scores
from afmrl_ray.retrieval.ranking import Ranking, rank_gallery

torch.set_num_threads(1)


def _problem(seed: int, *, queries: int, gallery: int, dim: int, values: int | None = None) -> dict[str, Any]:
    """Small integer coordinates (`values`) make exact ties; otherwise half of the gallery are exact duplicates."""
    draw = np.random.default_rng(seed)
    total = queries + gallery

    def embeddings(n: int) -> np.ndarray:
        if values is not None:
            return draw.integers(0, values, (n, dim)).astype(np.float32)
        x = draw.standard_normal((n, dim)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    found = embeddings(gallery)
    found[gallery // 2 :] = found[draw.integers(0, gallery // 2, gallery - gallery // 2)]
    # A third of the queries are gallery items themselves.
    rows = draw.permutation(total)
    inside = queries // 3
    return {
        "queries": embeddings(queries),
        "gallery": found,
        "query_rows": np.concatenate([rows[:inside], rows[gallery : gallery + queries - inside]]),
        "gallery_rows": rows[:gallery],
        "query_labels": draw.integers(-1, gallery // 3, queries),
        "gallery_labels": draw.integers(-1, gallery // 3, gallery),
        "gallery_order": draw.permutation(gallery) * 3,
    }


def _sorted_lists(p: dict[str, Any]) -> list[tuple[int, list[int], list[int]]]:
    """(query row, ranked gallery rows without its own, ranks of its positives) by sorting everything."""
    out = []
    for q, row, label in zip(p["queries"], p["query_rows"], p["query_labels"], strict=True):
        scores = p["gallery"].astype(np.float64) @ q.astype(np.float64)
        order = [i for i in np.lexsort((p["gallery_order"], -scores.round(6))) if p["gallery_rows"][i] != row]
        ranks = [r for r, i in enumerate(order) if label >= 0 and p["gallery_labels"][i] == label]
        if ranks:
            out.append((int(row), p["gallery_rows"][order].tolist(), ranks))
    return out


def _same(a: Ranking, b: Ranking) -> None:
    for name in Ranking.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# Sums of small integers are exact in any tile; real values in tiles of another shape are another kernel's.
@pytest.mark.parametrize("sort_from", [1, 100])
@pytest.mark.parametrize(("shape", "values"), [((256, 4096), None), ((256, 4096), 2), ((4, 16), 2), ((3, 7), 2)])
def test_ranking_equals_a_full_sort(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], values: int | None, sort_from: int
) -> None:
    monkeypatch.setattr(ranking, "QUERY_TILE", shape[0])
    monkeypatch.setattr(scores, "GALLERY_TILE", shape[1])
    monkeypatch.setattr(scores, "_SORT_FROM", sort_from)
    for seed in range(5):
        problem = _problem(seed, queries=30, gallery=60, dim=5, values=values)
        found = rank_gallery(**problem, depth=80)
        expected = _sorted_lists(problem)
        assert found.excluded == 30 - len(expected) > 0
        assert found.query_rows.tolist() == [row for row, _, _ in expected]
        for index, (_, order, ranks) in enumerate(expected):
            span = slice(found.offsets[index], found.offsets[index + 1])
            assert found.ranks[span].tolist() == ranks
            assert found.positives[index] == len(ranks)
            assert found.candidates[index] == len(order)
            assert found.top_rows[index].tolist() == order + [-1] * (80 - len(order))
            assert np.flatnonzero(found.top_right[index]).tolist() == ranks
            assert np.isneginf(found.top_scores[index]).sum() == 80 - len(order)


@pytest.mark.parametrize("dim", [64, 100, 1536])
def test_ties_of_duplicates_depend_neither_on_item_order_nor_on_other_queries(dim: int) -> None:
    """Real-valued duplicates in several tiles: scores that differed in the last bit would swap them."""
    problem = _problem(1, queries=150, gallery=9000, dim=dim)
    problem["query_labels"] = np.arange(150) % 40
    problem["gallery_labels"] = np.arange(9000) % 3000
    whole = rank_gallery(**problem, depth=20)
    shuffle = np.random.default_rng(2).permutation(9000)
    shuffled = {name: value[shuffle] if name.startswith("gallery") else value for name, value in problem.items()}
    _same(rank_gallery(**shuffled, depth=20), whole)
    for first in (0, 60):
        part = slice(first, first + 7)
        some = {name: value[part] if name.startswith("quer") else value for name, value in shuffled.items()}
        found = rank_gallery(**some, depth=20)
        np.testing.assert_array_equal(found.top_rows, whole.top_rows[part])
        np.testing.assert_array_equal(found.ranks, whole.ranks[whole.offsets[first] : whole.offsets[first + 7]])


@pytest.mark.parametrize("sort_from", [1, 100])
def test_collapsed_embeddings_rank_by_tie_order_alone(monkeypatch: pytest.MonkeyPatch, sort_from: int) -> None:
    """All scores equal: without a tie rule a collapsed encoder could look perfect."""
    monkeypatch.setattr(scores, "_SORT_FROM", sort_from)
    problem = _problem(3, queries=4, gallery=50, dim=8)
    problem["gallery"][:] = problem["gallery"][0]
    problem["query_rows"] = np.arange(4) + 1000
    problem["query_labels"][:] = 1
    problem["gallery_labels"] = np.where(problem["gallery_order"] == 3 * 17, 1, 0)
    found = rank_gallery(**problem, depth=5)
    assert found.ranks.tolist() == [17] * 4


@pytest.mark.parametrize("sort_from", [1, 100])
def test_embeddings_that_are_not_numbers_rank_last(monkeypatch: pytest.MonkeyPatch, sort_from: int) -> None:
    """A diverged encoder must not look perfect."""
    monkeypatch.setattr(scores, "_SORT_FROM", sort_from)
    problem = _problem(5, queries=3, gallery=40, dim=8)
    problem["query_rows"] = np.arange(3) + 1000
    problem["query_labels"][:] = 1
    problem["gallery_labels"] = np.where(problem["gallery_order"] == 0, 1, 0)
    problem["gallery"][problem["gallery_order"] == 0] = np.nan
    assert rank_gallery(**problem, depth=5).ranks.min() >= 39


def test_no_query_with_a_positive_gives_an_empty_ranking() -> None:
    problem = _problem(4, queries=5, gallery=9, dim=3)
    problem["query_labels"][:] = -1
    problem["gallery_labels"][:] = -1
    found = rank_gallery(**problem, depth=3)
    assert found.excluded == 5
    assert len(found.query_rows) == len(found.ranks) == 0


def test_a_search_within_groups_equals_one_search_for_each_group() -> None:
    p = _problem(3, queries=60, gallery=150, dim=4, values=2)
    p |= {name: p[name] % 8 for name in ("query_labels", "gallery_labels")}
    draw = np.random.default_rng(0)
    of_row = draw.integers(-1, 4, 210)
    groups = {"query_groups": of_row[p["query_rows"]], "gallery_groups": of_row[p["gallery_rows"]]}
    together = rank_gallery(**p, **groups, depth=5)
    for group in range(4):
        sides = {side: groups[f"{side}_groups"] == group for side in ("query", "gallery")}
        alone = rank_gallery(
            **{name: values[sides["query" if name.startswith("quer") else "gallery"]] for name, values in p.items()},
            depth=5,
        )
        mine = np.flatnonzero(np.isin(together.query_rows, alone.query_rows))
        assert len(mine) > 1
        for name in ("query_rows", "positives", "candidates", "top_rows", "top_scores", "top_right"):
            np.testing.assert_array_equal(getattr(together, name)[mine], getattr(alone, name), err_msg=name)
        ranks = [together.ranks[together.offsets[i] : together.offsets[i + 1]] for i in mine]
        np.testing.assert_array_equal(np.concatenate(ranks), alone.ranks)
    outside = p["query_rows"][groups["query_groups"] < 0]
    assert not np.isin(outside, together.query_rows).any()
