"""A step whose reward calls take 200 ms longer, against the longest of its parts and against their sum.

Sampler and learner sleep instead of computing, so that the parts do not compete for two cores; messages, rollout pool,
reward service and prefetching are those of a training.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from typing import Any

import numpy as np
import ray

from afmrl_ray.config.models import VisionCacheConfig
from afmrl_ray.config.train import RewardConfig, RolloutConfig
from afmrl_ray.rar.messages import Weights
from afmrl_ray.rar.prefetch import RolloutPrefetcher
from afmrl_ray.rar.reward.client import RewardPool
from afmrl_ray.rar.reward.spec import RewardSpec
from afmrl_ray.rar.rollout import RolloutPool
from afmrl_ray.rar.rollout_batch import Collector, RolloutRequest
from jobs.benchmarks.harness import Comparison, comparison
from jobs.benchmarks.rar_reward import make_spec
from jobs.benchmarks.rar_scaling import GROUP_SIZE, Sleeper
from jobs.benchmarks.tiny import make_bench

LATENCY_S, CHUNK_S, LEARN_S = 0.2, 0.25, 2.0
CHUNKS, CHUNK, RUNNERS, STEPS = 16, 2, 2, 6
TIMELESS = RewardConfig(k=5, pool={"num_workers": 1, "batch_size": CHUNK * GROUP_SIZE})


class Napper(Sleeper):
    """A sleeper with a shorter time per chunk."""

    def __init__(self, spec: Any, config: Any, threads: int) -> None:
        super().__init__(spec, config, threads, CHUNK_S)


class SlowPool(RewardPool):
    """A reward service with `LATENCY_S` of additional latency per call."""

    async def _call(self, actor: int, gallery: str, queries: list[Any]) -> Any:
        await asyncio.sleep(LATENCY_S)
        return await super()._call(actor, gallery, queries)


def seeds_of(rows: list[int], use: int, step: int) -> list[int]:
    """Seeds that never repeat, so that the service has no cached scores of the texts."""
    return [1000 * (100 * use + step) + place for place in range(len(rows))]


def by_parts(rollouts: RolloutPool, rewards: RewardPool, rows: list[int], draw: int) -> dict[str, float]:
    """Seconds of a step's parts without overlap: sampling, one reward call after another, learning."""
    began = time.perf_counter()
    groups = rollouts.sample(rows, seeds_of(rows, 9, draw), group_size=GROUP_SIZE)
    sampled = time.perf_counter()
    for start in range(0, len(groups), CHUNK):
        queries = [(group.row, text) for group in groups[start : start + CHUNK] for text, _ in group.texts]
        rewards.score("train", queries)
    return {"rollout": sampled - began, "reward": time.perf_counter() - sampled, "learn": LEARN_S}


def piped(collector: Collector, rows: list[int], lag: int) -> list[float]:
    """Seconds of every step with overlapping parts, except the first one; `lag` = steps that rollouts run ahead."""
    request = RolloutRequest(gallery="train", group_size=GROUP_SIZE, max_attributes=64, invalid_reward=-0.1)

    def collect(step: int) -> Any:
        return collector.collect(rows, seeds_of(rows, lag, step), request)

    ahead = RolloutPrefetcher(collect, lag=lag, steps=STEPS + 2)
    found = []
    for step in range(STEPS):
        began = time.perf_counter()
        assert not np.isnan(ahead.take(step).rewards).any()
        time.sleep(LEARN_S)
        ahead.wait()
        found.append(time.perf_counter() - began)
    ahead.close()
    return found[1:]


def comparisons() -> list[Comparison]:
    """Time steps on-policy and with rollouts one step ahead."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        namespace="bench",
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=tempfile.mkdtemp(prefix="r", dir="/tmp"),
    )
    try:
        bench = make_bench(16, 64)
        return _measured(make_spec(bench, VisionCacheConfig()), bench)
    finally:
        ray.shutdown()


def _measured(spec: RewardSpec, bench: Any) -> list[Comparison]:
    catalogue = bench.catalogue
    rows = catalogue.rows(spec.queries["train"]).tolist()[: CHUNKS * CHUNK]
    pool = {"num_workers": RUNNERS, "cpus_per_worker": 0.5, "batch_size": CHUNK}
    rollouts = RolloutPool(None, RolloutConfig(pool=pool), engine=Napper)  # type: ignore[arg-type]
    rollouts.push(Weights(0, "none", [ray.put({})]))
    rewards = SlowPool(spec, TIMELESS, name="bench-latency")
    rewards.wait_until_ready()
    try:
        rewards.score("train", [(row, "warm: up") for row in rows])
        parts = [by_parts(rollouts, rewards, rows, draw) for draw in range(STEPS)]
        steps = {lag: piped(Collector(rollouts, rewards), rows, lag) for lag in (0, 1)}
    finally:
        rollouts.close()
        rewards.close()
    median = {name: float(np.median([part[name] for part in parts])) for name in parts[0]}
    parts_text = ", ".join(f"{name} {value:.2f} s" for name, value in median.items())
    name = f"step with {1e3 * LATENCY_S:.0f} ms per reward call, {CHUNKS} calls"
    scoring = median["reward"] - CHUNKS * LATENCY_S
    # On-policy, learning begins after the last reward.
    ideal = {0: max(median["rollout"], scoring) + LEARN_S, 1: max(median["rollout"], scoring, LEARN_S)}
    found = []
    for lag, seconds in steps.items():
        what = "one step ahead" if lag else "on-policy"
        longest = "its longest part" if lag else "longer of sampling and scoring, then learning"
        found += [
            comparison(
                f"{name}, {what}",
                longest,
                [(mine, ideal[lag]) for mine in seconds],
                target=1.2,
                equality=f"parts without overlap: {parts_text}; no reward is missing",
            ),
            comparison(
                f"{name}, {what}",
                "sum of the parts",
                [(mine, sum(median.values())) for mine in seconds],
                target=0.6,
                equality=f"parts without overlap: {parts_text}; no reward is missing",
            ),
        ]
    return found
