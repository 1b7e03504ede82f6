from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from afmrl_ray.rar.requests import spread

QUERIES = st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcdef")), min_size=1, max_size=80)


@given(QUERIES, st.integers(1, 5), st.integers(1, 12))
def test_every_query_is_sent_once_and_a_item_is_cut_only_where_it_must_be(queries, actors, size):
    requests = spread(queries, actors=actors, size=size)
    sent = [query for request in requests for query in request.queries]
    assert sorted(sent) == sorted(set(queries))
    assert all(0 < len(request.queries) <= size for request in requests)
    for row in {row for row, _ in queries}:
        parts = [sum(asked == row for asked, _ in request.queries) for request in requests]
        parts = [count for count in parts if count]
        assert len(parts) == 1 or sum(parts) > size
        assert len({request.actor for request in requests if any(asked == row for asked, _ in request.queries)}) == 1


@given(QUERIES, st.integers(1, 5))
def test_no_actor_gets_more_than_its_share_and_a_item(queries, actors):
    loads = [0] * actors
    for request in spread(queries, actors=actors, size=1000):
        loads[request.actor] += len(request.queries)
    assert max(loads) <= -(-len(set(queries)) // actors) + 6


def test_a_item_goes_to_the_same_actor_whoever_asks():
    first = spread([(4, "a"), (5, "a")], actors=2, size=10)
    second = spread([(5, "b"), (8, "a")], actors=2, size=10)
    assert [(request.actor, request.queries) for request in first] == [(0, [(4, "a")]), (1, [(5, "a")])]
    assert [(request.actor, request.queries) for request in second] == [(0, [(8, "a")]), (1, [(5, "b")])]
