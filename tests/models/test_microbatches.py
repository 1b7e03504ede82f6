from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from afmrl_ray.models.microbatches import cut_by_tokens

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths, st.integers(1, 200), st.booleans())
def test_every_row_is_in_one_part_and_parts_fit(rows, budget, in_order):
    parts = cut_by_tokens(rows, budget, in_order=in_order)
    assert sorted(row for part in parts for row in part) == list(range(len(rows)))
    for part in parts:
        assert len(part) == 1 or max(rows[row] for row in part) * len(part) <= budget
    if in_order:
        assert [row for part in parts for row in part] == list(range(len(rows)))


@given(lengths, st.integers(1, 200))
def test_no_part_could_have_taken_the_next_row(rows, budget):
    for in_order in (False, True):
        parts = cut_by_tokens(rows, budget, in_order=in_order)
        for part, following in itertools.pairwise(parts):
            together = [*part, following[0]]
            assert max(rows[row] for row in together) * len(together) > budget


def test_rows_of_like_length_share_a_part():
    assert cut_by_tokens([10, 1, 10, 1], 20) == [[0, 2], [1, 3]]
    assert cut_by_tokens([10, 1, 10, 1], 20, in_order=True) == [[0, 1], [2, 3]]
