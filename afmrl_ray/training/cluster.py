"""How a job meets Ray: joining or starting it, and checking that it has what a stage asks for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from afmrl_ray.config.cluster import RayConfig
from afmrl_ray.errors import ResourceError

log = logging.getLogger(__name__)

# Without it a LearnerGroup collected after shutdown starts a new Ray and hangs the driver's exit.
_WORKER_ENVIRONMENT = {
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning,ignore::UserWarning",
}


@contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Join the cluster of `ray.address` or RAY_ADDRESS, or start a local Ray; leave it as it was found.

    Raises:
        ResourceError: the cluster named by the address cannot be reached.
    """
    import ray

    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    if ray.is_initialized():
        yield
        return
    address = config.address or ("auto" if os.environ.get("RAY_ADDRESS") else None)
    common = {"namespace": config.namespace, "log_to_driver": True, "logging_level": logging.WARNING}
    environment = {"env_vars": dict(_WORKER_ENVIRONMENT)}
    if address is not None:
        try:
            ray.init(address=address, runtime_env=environment, **common)
        except ConnectionError as error:
            raise ResourceError(f"ray.address {address}: no Ray cluster answers there") from error
    else:
        ray.init(
            num_cpus=config.num_cpus,
            object_store_memory=config.object_store_mb * 2**20,
            # Without the dashboard's State API, Ray Train complains once a second.
            include_dashboard=True,
            runtime_env=environment,
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()


def require_resources(stage: str, asked: Mapping[str, float], *, wait_s: float = 0.0) -> None:
    """Make sure that the cluster could ever give what a stage asks for, waiting for nodes that may still join.

    Args:
        stage: named in the message.
        asked: total per resource, e.g. {"CPU": 4, "GPU": 2}.

    Raises:
        ResourceError: after `wait_s` seconds the cluster still has less.
    """
    import ray

    deadline = time.monotonic() + wait_s
    while True:
        there = ray.cluster_resources()
        short = {name: amount for name, amount in asked.items() if amount > there.get(name, 0) + 1e-6}
        if not short:
            return
        if time.monotonic() >= deadline:
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in asked.items() if amount)
            found = ", ".join(f"{there.get(name, 0):g} {name}" for name in asked)
            raise ResourceError(
                f"{stage} asks for {wanted}; the cluster has {found}. "
                f"Lower its num_workers, cpus_per_worker or GPUs, or add nodes"
            )
        log.warning("%s waits for resources: %s", stage, short)
        time.sleep(min(2.0, wait_s))


def torch_threads(cpus: float) -> int:
    """Torch threads of an actor that holds `cpus` CPUs."""
    return max(1, int(cpus))
