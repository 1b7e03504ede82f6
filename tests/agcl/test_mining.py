"""Groups of attribute neighbours: who is grouped with whom, against scores that are computed pair by pair."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from afmrl_ray.agcl import mining
from afmrl_ray.agcl.mining import AttributeNeighbours

COLORS, SHAPES = ("red", "blue", "green"), ("round", "square", "flat", "long")


def index_of(sets: list[set[int]], **options: float) -> AttributeNeighbours:
    rows = [row for row, own in enumerate(sets) for _ in own]
    columns = [column for own in sets for column in sorted(own)]
    width = max(columns, default=0) + 1
    shape = (len(sets), width)
    return AttributeNeighbours(sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape), **options)


def groups_of(index: AttributeNeighbours, size: int, seed: int) -> list[np.ndarray]:
    """All groups, each of products that are in none before it."""
    free, found = np.ones(len(index), dtype=bool), []
    for group in index.groups(size, np.random.default_rng(seed), free):
        assert free[group].all()
        free[group] = False
        found.append(group)
    return found


def similarity(sets: list[set[int]], one: int, other: int) -> float:
    """The sum of Lucene's idf of the shared pairs, written down once more."""
    total = 0.0
    for column in sets[one] & sets[other]:
        frequency = sum(column in own for own in sets)
        total += math.log(1 + (len(sets) - frequency + 0.5) / (frequency + 0.5))
    return total


SETS = st.lists(st.sets(st.integers(0, 9), max_size=5), min_size=2, max_size=25)


@settings(max_examples=60, deadline=None)
@given(SETS, st.integers(2, 5), st.integers(0, 99))
def test_a_seeds_neighbours_are_the_most_similar_free_products(sets, size, seed):
    groups = groups_of(index_of(sets), size, seed)
    taken: set[int] = set()
    for group in groups:
        first, *others = group.tolist()
        assert 2 <= len(group) <= size
        assert not taken & set(group.tolist())
        free = [p for p in range(len(sets)) if p not in taken and p != first and sets[first] & sets[p]]
        expected = sorted((similarity(sets, first, p) for p in free), reverse=True)[: size - 1]
        assert [similarity(sets, first, p) for p in others] == pytest.approx(expected, abs=1e-3)
        taken |= set(group.tolist())


def test_every_product_with_a_neighbour_is_grouped_when_sizes_fit():
    # Four families of six that share a pair, each with a pair of its own.
    sets = [{family, 10 + product} for product in range(24) for family in [product // 6]]
    groups = groups_of(index_of(sets), 6, 0)
    assert sorted(sorted(group.tolist()) for group in groups) == [list(range(f, f + 6)) for f in (0, 6, 12, 18)]


def test_products_that_are_not_free_are_in_no_group():
    index = index_of([{0} for _ in range(9)])
    free = np.arange(9) % 3 > 0
    (group,) = itertools.islice(index.groups(9, np.random.default_rng(0), free), 1)
    assert sorted(group.tolist()) == [1, 2, 4, 5, 7, 8]


def test_groups_are_a_function_of_the_draw_and_differ_between_draws():
    sets = [{product % 3, 3 + product % 4} for product in range(60)]
    index = index_of(sets)
    first, again, other = (groups_of(index, 4, seed) for seed in (1, 1, 2))
    assert [group.tolist() for group in first] == [group.tolist() for group in again]
    assert [group.tolist() for group in first] != [group.tolist() for group in other]


def test_probable_duplicates_are_not_grouped_below_the_similarity_limit():
    sets = [{0, 1, 2}, {0, 1, 2}, {0, 1, 3}, {0, 1, 4}]
    assert {0, 1} <= set(groups_of(index_of(sets), 4, 0)[0].tolist())
    for seed in range(10):
        for group in groups_of(index_of(sets, max_similarity=0.95), 4, seed):
            # The two equal products are never seed and neighbour of each other.
            assert not (group[0] in (0, 1) and {0, 1} <= set(group.tolist()))


def test_products_are_described_by_what_most_of_their_items_say():
    texts = ["color: red; shape: flat", "color: red; shape: long", "color: blue; shape: flat", "", "color: red"]
    index = AttributeNeighbours.from_texts(texts, [0, 0, 0, 0, 1], count=2)
    # Of product 0's three annotated items two say red and two say flat; blue and long are in the minority.
    assert np.diff(index._pairs.indptr).tolist() == [2, 1]
    (group,) = groups_of(index, 2, 0)
    assert sorted(group.tolist()) == [0, 1]


def test_items_without_a_product_or_attributes_are_ignored():
    index = AttributeNeighbours.from_texts(["color: red", "nonsense", "color: red"], [0, 1, -1], count=2)
    assert groups_of(index, 2, 0) == []


def test_long_posting_lists_are_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mining, "MAX_POSTINGS", 5)
    looked_at = []
    real = AttributeNeighbours._products_with

    def noted(self, column, draw):
        looked_at.append(real(self, column, draw))
        return looked_at[-1]

    monkeypatch.setattr(AttributeNeighbours, "_products_with", noted)
    sets = [{0, 1 + product % 2} for product in range(400)]
    assert groups_of(index_of(sets), 3, 0)
    assert max(map(len, looked_at)) == 5
    assert len({int(products[0]) for products in looked_at}) > 20, "always the same part of the list"
