"""What a reward actor counts, for the trainer's log and for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter

from ray.util.metrics import Counter, Gauge, Histogram

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]
_TAGS = ("actor", "gallery")
PARTS = ("prepare", "wait", "encode", "rank")
"""Where the time of a request goes: reading and tokenising, waiting for its batch, the encoder, the search."""


@dataclass
class ServiceStats:
    """Counts since an actor began.

    Attributes:
        requests: taken on.
        queries: in them.
        cache_hits: queries whose score was known.
        joined: queries that were being scored for another request.
        scored: queries that went through the encoder.
        batches: of the encoder.
        batch_requests_max: requests in the largest batch.
        batch_queries_max: queries in the largest batch.
        tokens: that the encoder was given, visual ones counted.
        in_flight: requests being worked on now.
        in_flight_max: most of them at once.
        queue_depth: requests that wait for their batch now.
        seconds_prepare, seconds_wait, seconds_encode, seconds_rank: see `PARTS`.
    """

    requests: int = 0
    queries: int = 0
    cache_hits: int = 0
    joined: int = 0
    scored: int = 0
    batches: int = 0
    batch_requests_max: int = 0
    batch_queries_max: int = 0
    tokens: int = 0
    in_flight: int = 0
    in_flight_max: int = 0
    queue_depth: int = 0
    seconds_prepare: float = 0.0
    seconds_wait: float = 0.0
    seconds_encode: float = 0.0
    seconds_rank: float = 0.0


class Meter:
    """Counts what one actor does, and tells Prometheus (`afmrl_reward_*`, by actor and gallery).

    Args:
        actor: its name.
    """

    def __init__(self, actor: str) -> None:
        self.stats = ServiceStats()
        self._actor = actor
        self._counters = {
            "requests": Counter("afmrl_reward_requests", "Requests taken on.", _TAGS),
            "queries": Counter("afmrl_reward_queries", "Queries in them.", _TAGS),
            "cache_hits": Counter("afmrl_reward_cache_hits", "Queries whose score was known.", _TAGS),
            "joined": Counter("afmrl_reward_joined", "Queries being scored for another request.", _TAGS),
            "scored": Counter("afmrl_reward_scored", "Queries that went through the encoder.", _TAGS),
            "tokens": Counter("afmrl_reward_tokens", "Tokens given to the encoder.", _TAGS),
        }
        self._seconds = {
            part: Histogram(
                f"afmrl_reward_{part}_seconds", f"Seconds of a request's or batch's {part}.", _SECONDS, _TAGS
            )
            for part in PARTS
        }
        self._batch = Histogram("afmrl_reward_batch_queries", "Queries encoded together.", _SIZES, _TAGS)
        self._in_flight = Gauge("afmrl_reward_in_flight", "Requests being worked on.", ("actor",))
        self._depth = Gauge("afmrl_reward_queue_depth", "Requests that wait for their batch.", ("actor",))

    @contextmanager
    def request(self, gallery: str, queries: int) -> Iterator[None]:
        """Around one request."""
        self._add(gallery, requests=1, queries=queries)
        self.stats.in_flight += 1
        self.stats.in_flight_max = max(self.stats.in_flight_max, self.stats.in_flight)
        self._in_flight.set(self.stats.in_flight, {"actor": self._actor})
        try:
            yield
        finally:
            self.stats.in_flight -= 1
            self._in_flight.set(self.stats.in_flight, {"actor": self._actor})

    def known(self, gallery: str, *, kept: int, joined: int) -> None:
        """Queries of a request that were not encoded for it."""
        self._add(gallery, cache_hits=kept, joined=joined)

    def queued(self, depth: int) -> None:
        """Requests that wait for their batch."""
        self._depth.set(depth, {"actor": self._actor})

    def batch(self, requests: int, queries: Mapping[str, int], tokens: Mapping[str, int]) -> None:
        """A batch of the encoder; queries and tokens by gallery."""
        self.stats.batches += 1
        self.stats.batch_requests_max = max(self.stats.batch_requests_max, requests)
        self.stats.batch_queries_max = max(self.stats.batch_queries_max, sum(queries.values()))
        for gallery, count in queries.items():
            self._add(gallery, scored=count, tokens=tokens[gallery])
            self._batch.observe(count, self._tags(gallery))

    @contextmanager
    def seconds(self, part: str, gallery: str) -> Iterator[None]:
        """Around one of `PARTS`."""
        began = perf_counter()
        try:
            yield
        finally:
            self.spent(part, gallery, perf_counter() - began)

    def spent(self, part: str, gallery: str, seconds: float) -> None:
        """Add seconds to one of `PARTS`."""
        name = f"seconds_{part}"
        setattr(self.stats, name, getattr(self.stats, name) + seconds)
        self._seconds[part].observe(seconds, self._tags(gallery))

    def _add(self, gallery: str, **counts: int) -> None:
        for name, count in counts.items():
            if count:
                setattr(self.stats, name, getattr(self.stats, name) + count)
                self._counters[name].inc(count, self._tags(gallery))

    def _tags(self, gallery: str) -> dict[str, str]:
        return {"actor": self._actor, "gallery": gallery}


def summed(stats: Iterable[ServiceStats]) -> ServiceStats:
    """Counts of several actors; of what is a largest size, the largest."""
    out: dict[str, float] = asdict(ServiceStats())
    for each in stats:
        for name, value in asdict(each).items():
            out[name] = max(out[name], value) if name.endswith("_max") else out[name] + value
    return ServiceStats(**out)  # type: ignore[arg-type]


def since(now: ServiceStats, before: ServiceStats | None) -> ServiceStats:
    """What was counted after `before`; everything, if the actor began anew in between."""
    if before is None or now.requests < before.requests:
        return now
    earlier = asdict(before)
    state = ("in_flight", "queue_depth")
    return ServiceStats(
        **{
            name: value if name.endswith("_max") or name in state else value - earlier[name]
            for name, value in asdict(now).items()
        }
    )
