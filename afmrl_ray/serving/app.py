"""The application: `serve run afmrl_ray.serving:app_builder run=runs/demo`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from afmrl_ray import storage
from afmrl_ray.catalogue.images import decode_image
from afmrl_ray.config.load import validate_as
from afmrl_ray.config.serving import ReplicasConfig, ServingConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.retrieval.item_table import thumbnail
from afmrl_ray.runs.records import RunReader
from afmrl_ray.serving.api import make_api
from afmrl_ray.serving.bundle import Bundle, open_bundle
from afmrl_ray.serving.deployments import EncoderDeployment, GeneratorDeployment, IndexDeployment
from afmrl_ray.serving.errors import Problem
from afmrl_ray.serving.handles import HandleEncoder, HandleGenerator, HandleIndex
from afmrl_ray.serving.metrics import CACHE, REQUEST_SECONDS, REQUESTS, ROUND, SECONDS, STAGE_SECONDS, ServingMetrics
from afmrl_ray.serving.security import Keys
from afmrl_ray.serving.service import SearchService
from afmrl_ray.serving.store import ItemStore
from afmrl_ray.serving.uploads import FORMATS

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 1
_REPLICA_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
}
"""Ray Serve's throughput settings for replicas. Everything that blocks runs on threads of its own here, so one event
loop is enough, and requests do not change threads."""


@serve.ingress()
class Ingress:
    """The HTTP deployment: the API over handles of the inner deployments."""

    def __init__(
        self,
        config: ServingConfig,
        bundle: Bundle,
        encoder: DeploymentHandle,
        generator: DeploymentHandle,
        index: DeploymentHandle,
    ) -> None:
        self._config, self._bundle = config, bundle
        context = serve.get_replica_context()
        self._metrics = ServingMetrics(context.replica_id.unique_id, _ray_metrics())
        self._service = SearchService(
            HandleEncoder(encoder, "encoder"),
            HandleGenerator(generator, "generator"),
            HandleIndex(index, "index"),
            cached_attributes=config.cached_attributes,
            meter=self._metrics,
        )
        self._switching: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        return make_api(
            self._service,
            self._config,
            Keys.read(self._config.auth),
            self._metrics,
            self._open_round,
            lambda data: _thumbnail(data, self._bundle.index.thumbnail_px),
        )

    def _open_round(self, number: int | None) -> Bundle:
        return open_bundle(RunReader.open(self._config.run), number)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Switch to the round that `user_config` names, in the background.

        Raises:
            ConfigError: it has another key, or the round cannot be served.
            CheckpointError: see `bundle.open_bundle`.
        """
        unknown = sorted(set(user_config) - {"round"})
        if unknown:
            raise ConfigError(f"user_config: unknown key {unknown[0]!r}; it has: round")
        if user_config.get("round") is not None:
            bundle = self._open_round(int(user_config["round"]))
            self._switching = asyncio.create_task(self._switch(bundle))

    async def _switch(self, bundle: Bundle) -> None:
        try:
            await self._service.switch(bundle)
        except Problem as problem:
            # Another replica of the ingress may be switching, since all are given the same user_config.
            log.warning("user_config.round %d: %s", bundle.round, problem.detail)

    async def pid(self) -> int:
        """Process id of the replica that answers."""
        return os.getpid()


def app_builder(arguments: ServingConfig | Mapping[str, Any]) -> serve.Application:
    """The application of a run.

    Args:
        arguments: typed, or the plain values of `serve run` and deploy files.

    Raises:
        UserError: an argument is wrong, the run cannot be served, or there is neither a key nor anonymous access.
    """
    arguments = validate_as(ServingConfig, arguments)
    run = RunReader.open(arguments.run)
    Keys.read(arguments.auth)
    state_dir = arguments.state_dir or storage.join(run.path, "serving")
    if not storage.is_local(state_dir):
        raise ConfigError(
            f"state_dir: {state_dir} is not a local folder; name one that all replicas of the index share"
        )
    state_dir = storage.absolute(state_dir)
    bundle = _served(arguments, state_dir)
    inner = {
        "encoder": (EncoderDeployment, (arguments, bundle)),
        "generator": (GeneratorDeployment, (arguments, bundle)),
        "index": (IndexDeployment, (arguments, state_dir, bundle)),
    }
    handles = {
        name: serve.deployment(kind, name=name.capitalize(), **_options(getattr(arguments, name))).bind(*values)
        for name, (kind, values) in inner.items()
    }
    ingress = serve.deployment(Ingress, name="Ingress", **_options(arguments.ingress))
    return ingress.bind(arguments, bundle, **handles)


def _served(config: ServingConfig, state_dir: str) -> Bundle:
    """The bundle to start with: the one that was served last, else that of `round`, else that of the best round.

    Raises:
        ConfigError: `round` is another one than was served last; see also `open_bundle` and `ItemStore.state`.
    """
    run = RunReader.open(config.run)
    store = ItemStore(state_dir)
    try:
        state = store.state()
    finally:
        store.close()
    if state is not None:
        if config.round is not None and state.current.round != config.round:
            raise ConfigError(
                f"round: {state_dir} serves round {state.current.round}; leave round out, and switch to round "
                f"{config.round} with POST /admin/switch"
            )
        return state.current
    return open_bundle(run, config.round)


def _options(replicas: ReplicasConfig) -> dict[str, Any]:
    scaling: dict[str, Any] = {"num_replicas": replicas.min_replicas}
    if replicas.max_replicas > replicas.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.min_replicas,
                "max_replicas": replicas.max_replicas,
                "target_ongoing_requests": replicas.target_ongoing_requests,
            }
        }
    return {
        **scaling,
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "max_queued_requests": replicas.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=_RETRY_AFTER_S),
        "graceful_shutdown_timeout_s": replicas.drain_s,
        "ray_actor_options": {
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "runtime_env": {"env_vars": _REPLICA_ENVIRONMENT},
        },
    }


def _thumbnail(data: bytes, longest_px: int) -> bytes:
    return thumbnail(decode_image(data, formats=FORMATS), longest_px)


def _ray_metrics() -> Any:
    """A function that copies values into Ray's own metrics, which every node exports."""
    from ray.util.metrics import Counter, Gauge, Histogram

    bounds = list(SECONDS)
    record: dict[str, Any] = {
        REQUESTS: Counter(REQUESTS, "HTTP requests.", ("route", "status")).inc,
        REQUEST_SECONDS: Histogram(REQUEST_SECONDS, "Seconds per HTTP request.", bounds, ("route",)).observe,
        STAGE_SECONDS: Histogram(STAGE_SECONDS, "Seconds per stage of a search.", bounds, ("stage",)).observe,
        CACHE: Counter(CACHE, "Lookups in the attribute cache.", ("result",)).inc,
        ROUND: Gauge(ROUND, "Served round.").set,
    }

    def mirror(name: str, value: float, labels: Mapping[str, str]) -> None:
        record[name](value, tags=dict(labels))

    return mirror
