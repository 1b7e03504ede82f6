"""Counts of the reward service: per actor for Prometheus, and per training step for the trainer's log."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter

from ray.util.metrics import Counter, Gauge, Histogram

FAILURE_CAUSES = ("timeout", "died", "error", "version")
"""Why a request failed: deadline passed, actor died, actor raised, or actor searched another gallery version."""
PHASES = ("prepare", "wait", "encode", "rank")
"""Phases of a request: reading and tokenising, waiting for a batch, encoding, searching."""

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
_SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]
_TAGS = ("actor", "gallery")
_COUNTED = {
    "requests": "Requests received.",
    "queries": "Queries received.",
    "cache_hits": "Queries answered from the cache.",
    "joined": "Queries that another request was already scoring.",
    "scored": "Queries encoded and ranked.",
    "tokens": "Tokens encoded.",
}
_STATE = ("in_flight", "queue_depth")


@dataclass
class ServiceStats:
    """Counts since an actor started.

    Attributes:
        requests: requests received.
        queries: queries received.
        cache_hits: queries answered from the cache.
        joined: queries that another request was already scoring.
        scored: queries encoded and ranked.
        batches: forward batches of the encoder.
        batch_requests_max: requests in the largest batch.
        batch_queries_max: queries in the largest batch.
        tokens: tokens encoded, visual ones included.
        in_flight: requests in progress now.
        in_flight_max: most requests in progress at once.
        queue_depth: requests that wait for a batch now.
        seconds_prepare, seconds_wait, seconds_encode, seconds_rank: seconds by phase, see `PHASES`.
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
    """Counts the work of one actor and exports it to Prometheus (`afmrl_reward_*`, tagged by actor and gallery).

    Args:
        actor: name of the actor.
    """

    def __init__(self, actor: str) -> None:
        self.stats = ServiceStats()
        self._actor = actor
        self._counters = {name: Counter(f"afmrl_reward_{name}", text, _TAGS) for name, text in _COUNTED.items()}
        self._seconds = {
            phase: Histogram(f"afmrl_reward_{phase}_seconds", f"Seconds of the phase {phase}.", _SECONDS, _TAGS)
            for phase in PHASES
        }
        self._batch = Histogram("afmrl_reward_batch_queries", "Queries of an encoder batch.", _SIZES, _TAGS)
        self._in_flight = Gauge("afmrl_reward_in_flight", "Requests in progress.", ("actor",))
        self._depth = Gauge("afmrl_reward_queue_depth", "Requests that wait for a batch.", ("actor",))

    @contextmanager
    def request(self, gallery: str, queries: int) -> Iterator[None]:
        """Count a request while it is in progress."""
        self._add(gallery, requests=1, queries=queries)
        self._set_in_flight(self.stats.in_flight + 1)
        try:
            yield
        finally:
            self._set_in_flight(self.stats.in_flight - 1)

    def _set_in_flight(self, count: int) -> None:
        self.stats.in_flight, self.stats.in_flight_max = count, max(self.stats.in_flight_max, count)
        self._in_flight.set(count, {"actor": self._actor})

    def reused(self, gallery: str, *, cached: int, joined: int) -> None:
        """Count queries of a request that were not encoded for it."""
        self._add(gallery, cache_hits=cached, joined=joined)

    def queued(self, depth: int) -> None:
        """Export the number of requests that wait for a batch."""
        self._depth.set(depth, {"actor": self._actor})

    def batch(self, requests: int, queries: Mapping[str, int], tokens: Mapping[str, int]) -> None:
        """Count a batch of the encoder; queries and tokens by gallery."""
        self.stats.batches += 1
        self.stats.batch_requests_max = max(self.stats.batch_requests_max, requests)
        self.stats.batch_queries_max = max(self.stats.batch_queries_max, sum(queries.values()))
        for gallery, count in queries.items():
            self._add(gallery, scored=count, tokens=tokens[gallery])
            self._batch.observe(count, self._tags(gallery))

    @contextmanager
    def timed(self, phase: str, gallery: str) -> Iterator[None]:
        """Time one of `PHASES`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add_seconds(phase, gallery, perf_counter() - start)

    def add_seconds(self, phase: str, gallery: str, seconds: float) -> None:
        """Add seconds to one of `PHASES`."""
        name = f"seconds_{phase}"
        setattr(self.stats, name, getattr(self.stats, name) + seconds)
        self._seconds[phase].observe(seconds, self._tags(gallery))

    def _add(self, gallery: str, **counts: int) -> None:
        for name, count in counts.items():
            if count:
                setattr(self.stats, name, getattr(self.stats, name) + count)
                self._counters[name].inc(count, self._tags(gallery))

    def _tags(self, gallery: str) -> dict[str, str]:
        return {"actor": self._actor, "gallery": gallery}


def sum_stats(stats: Iterable[ServiceStats]) -> ServiceStats:
    """Counts of several actors added up; the largest of each `*_max`."""
    total: dict[str, float] = asdict(ServiceStats())
    for each in stats:
        for name, value in asdict(each).items():
            total[name] = max(total[name], value) if name.endswith("_max") else total[name] + value
    return ServiceStats(**total)  # type: ignore[arg-type]


def stats_since(now: ServiceStats, before: ServiceStats | None) -> ServiceStats:
    """Counts after `before`, or all of `now` if the actor was restarted in between; maxima and states as they are."""
    if before is None or now.requests < before.requests:
        return now
    earlier = asdict(before)
    return ServiceStats(
        **{
            name: value if name.endswith("_max") or name in _STATE else value - earlier[name]
            for name, value in asdict(now).items()
        }
    )


class ServiceLog:
    """Turns the counts of actors and client, which only grow, into metrics of each training step."""

    def __init__(self) -> None:
        self._stats: dict[str, ServiceStats] = {}
        self._failures: Counts[str] = Counts()

    def step(self, stats: Mapping[str, ServiceStats], failures: Mapping[str, int]) -> dict[str, float]:
        """`reward/service_*` since the last call: counts and seconds over all actors, and failed requests by cause.

        Args:
            stats: counts of the actors, by name.
            failures: failed requests of the client, by cause.
        """
        counts = asdict(sum_stats(stats_since(now, self._stats.get(actor)) for actor, now in stats.items()))
        counts["batch_queries_mean"] = counts["scored"] / max(1, counts["batches"])
        counts |= {f"failed_{cause}": failures.get(cause, 0) - self._failures[cause] for cause in FAILURE_CAUSES}
        self._stats |= stats
        self._failures = Counts(failures)
        return {f"reward/service_{name}": float(value) for name, value in counts.items()}
