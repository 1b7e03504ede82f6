from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from afmrl_ray.models.microbatches import cut_by_tokens, cut_shared_prefix

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths, st.integers(1, 200), st.booleans())
def test_every_sequence_is_in_one_part_and_parts_fit_the_budget(rows, budget, in_order):
    parts = cut_by_tokens(rows, budget, in_order=in_order)
    assert sorted(row for part in parts for row in part) == list(range(len(rows)))
    for part in parts:
        assert len(part) == 1 or max(rows[row] for row in part) * len(part) <= budget
    if in_order:
        assert [row for part in parts for row in part] == list(range(len(rows)))


@given(lengths, st.integers(1, 200))
def test_no_part_has_room_for_the_next_sequence(rows, budget):
    for in_order in (False, True):
        parts = cut_by_tokens(rows, budget, in_order=in_order)
        for part, following in itertools.pairwise(parts):
            together = [*part, following[0]]
            assert max(rows[row] for row in together) * len(together) > budget


def test_sequences_of_similar_length_share_a_part():
    assert cut_by_tokens([10, 1, 10, 1], 20) == [[0, 2], [1, 3]]
    assert cut_by_tokens([10, 1, 10, 1], 20, in_order=True) == [[0, 1], [2, 3]]


groups = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 30), min_size=1, max_size=8)), min_size=1, max_size=12
)


def spent(part, owners, prefixes, lengths) -> int:
    rows = range(part.start, part.stop)
    return sum(lengths[row] for row in rows) + sum(
        prefixes[row] for row in rows if row == part.start or owners[row] != owners[row - 1]
    )


@given(groups, st.integers(1, 300))
def test_shared_prefixes_are_cut_in_order_within_the_budget_and_whole_where_they_fit(made, budget):
    owners = [owner for owner, (_, own) in enumerate(made) for _ in own]
    prefixes = [prefix for prefix, own in made for _ in own]
    lengths = [length for _, own in made for length in own]
    parts = cut_shared_prefix(owners, prefixes, lengths, budget)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(owners)))
    assert all(part.start < part.stop for part in parts)
    for part in parts:
        assert part.stop - part.start == 1 or spent(part, owners, prefixes, lengths) <= budget
    for owner, (prefix, own) in enumerate(made):
        within = {index for index, part in enumerate(parts) if owner in owners[part]}
        if prefix + sum(own) <= budget:
            assert len(within) == 1


def test_a_prefix_counts_once_for_its_neighbours():
    assert cut_shared_prefix([0, 0, 1, 1], [10] * 4, [5] * 4, 40) == [slice(0, 4)]
    assert cut_shared_prefix([0, 0, 1, 1], [10] * 4, [5] * 4, 39) == [slice(0, 2), slice(2, 4)]
    assert cut_shared_prefix([0, 0, 0], [10] * 3, [5] * 3, 20) == [slice(0, 2), slice(2, 3)]
