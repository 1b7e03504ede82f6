"""Metrics of an ingress replica, for `/metrics` and, through Ray, for the cluster's Prometheus."""

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
    """Metrics of one replica.

    Args:
        replica: label of all metrics.
        mirror: also called with every value, as (name, value, labels); None = `/metrics` only.
    """

    def __init__(self, replica: str, mirror: Callable[[str, float, Mapping[str, str]], None] | None = None) -> None:
        self._registry = CollectorRegistry()
        self._replica, self._mirror = replica, mirror
        common: Any = {"registry": self._registry}
        self._requests = Counter(REQUESTS, "HTTP requests.", ("replica", "route", "method", "status"), **common)
        self._seconds = Histogram(
            REQUEST_SECONDS, "Seconds per HTTP request.", ("replica", "route"), buckets=SECONDS, **common
        )
        self._stages = Histogram(
            STAGE_SECONDS, "Seconds per stage of a search.", ("replica", "stage"), buckets=SECONDS, **common
        )
        self._cache = Counter(CACHE, "Lookups in the attribute cache.", ("replica", "result"), **common)
        self._round = Gauge(ROUND, "Served round.", ("replica",), **common)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _report(self, name: str, value: float, **labels: str) -> None:
        if self._mirror is not None:
            self._mirror(name, value, labels)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Record an HTTP request."""
        self._requests.labels(self._replica, route, method, str(status)).inc()
        self._seconds.labels(self._replica, route).observe(seconds)
        self._report(REQUESTS, 1, route=route, status=str(status))
        self._report(REQUEST_SECONDS, seconds, route=route)

    def stage(self, name: str, seconds: float) -> None:
        """Record a stage of a search."""
        self._stages.labels(self._replica, name).observe(seconds)
        self._report(STAGE_SECONDS, seconds, stage=name)

    def attribute_cache(self, *, hit: bool) -> None:
        """Record a lookup in the attribute cache."""
        result = "hit" if hit else "miss"
        self._cache.labels(self._replica, result).inc()
        self._report(CACHE, 1, result=result)

    def round(self, number: int) -> None:
        """Record the served round."""
        self._round.labels(self._replica).set(number)
        self._report(ROUND, number)


class Observed:
    """ASGI middleware that records requests by route; all unknown paths count as one, which bounds the labels."""

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
