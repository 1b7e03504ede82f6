from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from afmrl_ray.rar.reward.batching import split_requests

QUERIES = st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcdef")), min_size=1, max_size=80)


@given(QUERIES, st.integers(1, 5), st.integers(1, 12))
def test_every_query_is_sent_once_and_an_item_is_cut_only_if_it_exceeds_a_request(queries, actors, size):
    requests = split_requests(queries, num_actors=actors, max_queries=size)
    sent = [query for request in requests for query in request.queries]
    assert sorted(sent) == sorted(set(queries))
    assert all(0 < len(request.queries) <= size for request in requests)
    for row in {row for row, _ in queries}:
        parts = [sum(other == row for other, _ in request.queries) for request in requests]
        parts = [count for count in parts if count]
        assert len(parts) == 1 or sum(parts) > size
        assert len({request.actor for request in requests if any(other == row for other, _ in request.queries)}) == 1


@given(QUERIES, st.integers(1, 5))
def test_no_actor_gets_more_than_an_equal_part_and_one_item(queries, actors):
    loads = [0] * actors
    for request in split_requests(queries, num_actors=actors, max_queries=1000):
        loads[request.actor] += len(request.queries)
    assert max(loads) <= -(-len(set(queries)) // actors) + 6


def test_an_item_goes_to_the_same_actor_from_every_client():
    first = split_requests([(4, "a"), (5, "a")], num_actors=2, max_queries=10)
    second = split_requests([(5, "b"), (8, "a")], num_actors=2, max_queries=10)
    assert [(request.actor, request.queries) for request in first] == [(0, [(4, "a")]), (1, [(5, "a")])]
    assert [(request.actor, request.queries) for request in second] == [(0, [(8, "a")]), (1, [(5, "b")])]
