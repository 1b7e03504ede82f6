"""What an ingress replica counts, for `/metrics` and, through Ray, for the cluster's Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from afmrl_ray.serving.limits import Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REQUESTS = "afmrl_serving_requests"
REQUEST_SECONDS = "afmrl_serving_request_seconds"
STAGE_SECONDS = "afmrl_serving_stage_seconds"
CACHE = "afmrl_serving_attribute_cache"
ROUND = "afmrl_serving_round"


class ServingMetrics:
    """Counters of one replica.

    Args:
        replica: label that tells replicas apart.
        mirror: told of every number too, as (name, value, labels); none = `/metrics` only.
    """

    def __init__(self, replica: str, mirror: Callable[[str, float, Mapping[str, str]], None] | None = None) -> None:
        self._registry = CollectorRegistry()
        self._replica, self._mirror = replica, mirror
        common: Any = {"registry": self._registry}
        self._requests = Counter(REQUESTS, "Requests.", ("replica", "route", "method", "status"), **common)
        self._seconds = Histogram(REQUEST_SECONDS, "Seconds.", ("replica", "route"), buckets=SECONDS, **common)
        self._stages = Histogram(STAGE_SECONDS, "Seconds by stage.", ("replica", "stage"), buckets=SECONDS, **common)
        self._cache = Counter(CACHE, "Attribute texts looked up.", ("replica", "result"), **common)
        self._round = Gauge(ROUND, "Round that is served.", ("replica",), **common)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def _tell(self, name: str, value: float, **labels: str) -> None:
        if self._mirror is not None:
            self._mirror(name, value, labels)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(self._replica, route, method, str(status)).inc()
        self._seconds.labels(self._replica, route).observe(seconds)
        self._tell(REQUESTS, 1, route=route, status=str(status))
        self._tell(REQUEST_SECONDS, seconds, route=route)

    def spent(self, stage: str, seconds: float) -> None:
        """A stage of a search is done."""
        self._stages.labels(self._replica, stage).observe(seconds)
        self._tell(STAGE_SECONDS, seconds, stage=stage)

    def cached(self, hit: bool) -> None:
        """Attributes were looked up."""
        result = "hit" if hit else "miss"
        self._cache.labels(self._replica, result).inc()
        self._tell(CACHE, 1, result=result)

    def round(self, number: int) -> None:
        """A round is served."""
        self._round.labels(self._replica).set(number)
        self._tell(ROUND, number)


class Observed:
    """ASGI middleware that counts requests by route; unknown paths are one route, so that nobody can make many."""

    def __init__(self, app: Any, metrics: ServingMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = perf_counter(), 500

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if route != "unknown" else "any"
            self._metrics.request(route, method, status, perf_counter() - began)
