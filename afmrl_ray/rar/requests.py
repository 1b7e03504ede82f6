"""Which queries make up a request, and which actor it is meant for: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afmrl_ray.rar.reward_spec import Query


@dataclass(frozen=True)
class Request:
    """Queries that are sent together.

    Attributes:
        actor: index of the actor that they are meant for.
        queries: each once, an item's side by side.
    """

    actor: int
    queries: list[Query]


def spread(queries: Sequence[Query], *, actors: int, size: int) -> list[Request]:
    """Cut queries into requests of at most `size`, an item's together where it fits.

    An item goes to the same actor every time, whoever asks, so that equal queries meet there; unless that actor would
    get more than its share, then to the one that has least.
    """
    items: dict[int, dict[Query, None]] = {}
    for query in queries:
        items.setdefault(query[0], {})[query] = None
    share = -(-sum(map(len, items.values())) // actors)
    loads = [0] * actors
    taken: list[list[list[Query]]] = [[] for _ in range(actors)]
    for row, own in items.items():
        home = row % actors
        if loads[home] + len(own) > share:
            home = loads.index(min(loads))
        loads[home] += len(own)
        taken[home].append(list(own))
    return [Request(actor, part) for actor in range(actors) for part in _cut(taken[actor], size)]


def _cut(items: list[list[Query]], size: int) -> list[list[Query]]:
    parts: list[list[Query]] = []
    for own in items:
        if parts and len(parts[-1]) + len(own) <= size:
            parts[-1] += own
        else:
            parts += [own[start : start + size] for start in range(0, len(own), size)]
    return parts
