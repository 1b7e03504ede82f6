"""How a client cuts its queries into requests, and which actor each request goes to: a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afmrl_ray.rar.reward.spec import Query


@dataclass(frozen=True)
class Request:
    """Queries that are sent together.

    Attributes:
        actor: index of the preferred actor.
        queries: distinct queries, those of an item next to each other.
    """

    actor: int
    queries: list[Query]


def split_requests(queries: Sequence[Query], *, num_actors: int, max_queries: int) -> list[Request]:
    """Cut queries into requests of at most `max_queries`; an item's queries stay together unless they exceed it.

    An item always goes to the same actor, whichever client asks, so that equal queries meet in its cache. When that
    actor would get more than an equal part of the queries, the item goes to the least loaded actor.
    """
    items: dict[int, dict[Query, None]] = {}
    for query in queries:
        items.setdefault(query[0], {})[query] = None
    capacity = -(-sum(map(len, items.values())) // num_actors)
    loads = [0] * num_actors
    assigned: list[list[list[Query]]] = [[] for _ in range(num_actors)]
    for row, own in items.items():
        actor = row % num_actors
        if loads[actor] + len(own) > capacity:
            actor = loads.index(min(loads))
        loads[actor] += len(own)
        assigned[actor].append(list(own))
    return [Request(actor, part) for actor in range(num_actors) for part in _cut(assigned[actor], max_queries)]


def _cut(items: list[list[Query]], size: int) -> list[list[Query]]:
    parts: list[list[Query]] = []
    for own in items:
        if parts and len(parts[-1]) + len(own) <= size:
            parts[-1] += own
        else:
            parts += [own[start : start + size] for start in range(0, len(own), size)]
    return parts
