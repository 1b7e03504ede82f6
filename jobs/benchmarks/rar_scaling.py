"""Rollouts on 1 to 64 runners of an 8-node cluster, against perfect scaling.

The sampler sleeps instead of sampling, so that 64 runners fit two cores; messages have realistic sizes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from afmrl_ray.rar.messages import PromptGroup, Weights
from jobs.benchmarks.harness import Comparison, comparison

NODES, RUNNERS, WAVES, CHUNK, REPEATS = 8, (1, 8, 64), 3, 4, 5
SECONDS = 2.0
"""Time of a chunk: that of 4 groups of 8 completions of a small model on a GPU."""
GROUP_SIZE, TOKENS, PAIRS = 8, 128, 12


class Sleeper:
    """A rollout engine that sleeps and returns a different text for every completion; it needs no torch."""

    def __init__(self, spec: Any, config: Any, threads: int, seconds: float = SECONDS) -> None:
        self._version, self._seconds = -1, seconds

    def set_weights(self, weights: Weights) -> tuple[int, str]:
        self._version = weights.version
        return weights.version, weights.fingerprint

    def sample(self, rows: Sequence[int], seeds: Sequence[int], *, group_size: int, version: int) -> list[PromptGroup]:
        time.sleep(self._seconds)
        shape = (group_size, TOKENS)
        text = "; ".join(f"attribute {index}: value {index}" for index in range(PAIRS))
        return [
            PromptGroup(
                row, version, np.full(shape, seed % 1000), np.ones(shape, bool), np.zeros(shape, np.float32),
                [(f"draw: {seed} {place}; {text}", True) for place in range(group_size)],
            )
            for row, seed in zip(rows, seeds, strict=True)
        ]  # fmt: skip


def measure(runners: int) -> list[tuple[float, float]]:
    """Wall seconds and CPU seconds of the driver, for each repeat of `WAVES` chunks on every runner."""
    from afmrl_ray.config.rar import RolloutConfig
    from afmrl_ray.rar.rollout import RolloutPool

    config = RolloutConfig(pool={"num_workers": runners, "cpus_per_worker": 1, "batch_size": CHUNK})
    pool = RolloutPool(None, config, engine=Sleeper)  # type: ignore[arg-type]
    pool.push(Weights(0, "none", [ray.put({})]))
    rows = list(range(runners * WAVES * CHUNK))
    found = []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        groups = pool.sample(rows, rows, group_size=GROUP_SIZE)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
        assert [group.row for group in groups] == rows, "groups are not in the order of the prompts"
    pool.close()
    return found


def comparisons() -> list[Comparison]:
    """Time rollouts on a cluster of several nodes on this machine."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_worker_niceness", "0")
    settings = {"num_cpus": max(RUNNERS) // NODES, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**settings, "include_dashboard": False, "temp_dir": tempfile.mkdtemp(prefix="r", dir="/tmp")},
    )
    for _ in range(NODES - 1):
        cluster.add_node(**settings)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        samples = {runners: measure(runners) for runners in RUNNERS}
    finally:
        ray.shutdown()
        cluster.shutdown()
    found = []
    for runners, times in samples.items():
        cpu = np.median([cpu for _, cpu in times]) / (runners * WAVES * CHUNK)
        found.append(
            comparison(
                f"rollouts on {runners} runners of {NODES} nodes, {SECONDS:g} s a chunk",
                "perfect scaling",
                [(wall, WAVES * SECONDS) for wall, _ in times],
                target=1 / 0.9,
                equality=f"every group once and in order; driver CPU {1e3 * cpu:.2f} ms per group",
            )
        )
    return found
