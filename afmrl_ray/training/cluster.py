"""Ray for a job: join or start a cluster, and check that it has the resources that a stage needs."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from afmrl_ray.config.cluster import PoolConfig, RayConfig, WorkersConfig
from afmrl_ray.errors import ResourceError
from afmrl_ray.user_name import user_name

log = logging.getLogger(__name__)

_ROUNDING = 1e-6

_WORKER_ENVIRONMENT = {
    # Otherwise a LearnerGroup that is garbage-collected after shutdown starts a new Ray, and the driver hangs at exit.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Otherwise Ray Train's workers print everything twice, and closed progress bars reappear.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning,ignore::UserWarning",
}


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Join the cluster of `ray.address` or RAY_ADDRESS, or start a local Ray for the time of the context.

    A Ray that this process has joined already is used and left running.

    Raises:
        ResourceError: no cluster can be reached at the address.
    """
    import ray

    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    if ray.is_initialized():
        yield
        return
    address = config.address or ("auto" if os.environ.get("RAY_ADDRESS") else None)
    common = {"namespace": config.namespace, "log_to_driver": True, "logging_level": logging.WARNING}
    environment = {"env_vars": {**_WORKER_ENVIRONMENT, "LOGNAME": user_name()}}
    if address is not None:
        _wait_for_head(config, address)
        try:
            ray.init(address=address, runtime_env=environment, **common)
        except ConnectionError as error:
            raise ResourceError(f"{_asked(config, address)}: no Ray cluster answers at this address") from error
    else:
        ray.init(
            num_cpus=config.num_cpus,
            object_store_memory=config.object_store_mb * 2**20,
            # Without the dashboard's State API, Ray Train logs a warning every second.
            include_dashboard=True,
            runtime_env=environment,
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _asked(config: RayConfig, address: str) -> str:
    """The setting that names the cluster, with its value."""
    return f"ray.address {address}" if config.address else f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS', address)}"


def _wait_for_head(config: RayConfig, address: str) -> None:
    """Wait until something listens at the address of a head node; Ray itself would try for a quarter of an hour.

    Raises:
        ResourceError: nothing listens there after `ray.wait_for_resources_s`.
    """
    named = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = named.rpartition("://")[2].rstrip("/").rpartition(":")
    if not (host and port.isdecimal()):
        return
    deadline = time.monotonic() + config.wait_for_resources_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"{_asked(config, address)}: nothing listens there after {config.wait_for_resources_s:g} s "
                    f"({error}); start the cluster, or unset it to start a local Ray"
                ) from error
            time.sleep(min(1.0, config.wait_for_resources_s))


@dataclass(frozen=True)
class Demand:
    """Resources of `count` actors or workers that run at once, each of which holds `each` on one node."""

    count: int
    each: Mapping[str, float]


def pool_demand(pool: PoolConfig) -> Demand:
    """Resources of a pool of actors."""
    return Demand(
        pool.num_workers, {"CPU": pool.cpus_per_worker, "GPU": pool.gpus_per_worker, **pool.placement.resources}
    )


def workers_demand(workers: WorkersConfig) -> Demand:
    """Resources that a worker group needs: of its smallest size if it is elastic."""
    each = {"CPU": workers.cpus_per_worker, "GPU": float(workers.use_gpu), **workers.placement.resources}
    return Demand(workers.least, each)


def total(demands: Sequence[Demand]) -> dict[str, float]:
    """Sum of the demands by resource."""
    names = {name for demand in demands for name in demand.each}
    return {name: sum(d.count * d.each.get(name, 0) for d in demands) for name in sorted(names)}


def require_resources(stage: str, demands: Sequence[Demand], *, wait_s: float = 0.0) -> None:
    """Check that the cluster's nodes have what a stage needs, used or not; wait for nodes that may still join.

    Args:
        stage: named in the message.
        demands: everything that the stage holds at once.
        wait_s: longest wait, seconds.

    Raises:
        ResourceError: after `wait_s` the cluster still has less, or no node is large enough for one worker.
    """
    import ray

    deadline = time.monotonic() + wait_s
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        missing = _missing(demands, nodes)
        if missing is None:
            return
        if time.monotonic() >= deadline:
            raise ResourceError(f"{stage} {missing}. Lower its num_workers, cpus_per_worker or GPUs, or add nodes")
        log.warning("%s %s, waiting", stage, missing)
        time.sleep(min(2.0, wait_s))


def _missing(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> str | None:
    asked = total(demands)
    available = {name: sum(node.get(name, 0) for node in nodes) for name in asked}
    if any(asked[name] > available[name] + _ROUNDING for name in asked):
        return f"asks for {format_resources(asked)}; the cluster has {format_resources(available, zeros=True)}"
    for demand in demands:
        if not any(
            all(amount <= node.get(name, 0) + _ROUNDING for name, amount in demand.each.items()) for node in nodes
        ):
            return f"asks for a node with {format_resources(demand.each)}; none of {len(nodes)} has that"
    return None


def format_resources(amounts: Mapping[str, float], *, zeros: bool = False) -> str:
    """Amounts as text, such as `2 CPU, 1 GPU`; amounts of zero only with `zeros`."""
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount or zeros)


def resources_available(config: RayConfig) -> dict[str, float]:
    """CPUs and GPUs of the cluster that a job would join, or of the local Ray that it would start.

    Raises:
        ResourceError: the cluster cannot be reached.
    """
    if config.address or os.environ.get("RAY_ADDRESS"):
        import ray

        with ray_session(config):
            return {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")}
    import torch

    return {"CPU": float(config.num_cpus or os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
