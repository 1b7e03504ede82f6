"""500 steps of RAR with small random models: no process's memory grows, and neither does the object store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from afmrl_ray.rar import rollout_batch
from afmrl_ray.rar.trainer import open_trainer
from tests.faults.harness import ROOT
from tests.rar.conftest import every_text_counts, small_job

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(2400)]

STEPS, EVERY, WARM_UP = 500, 10, 150
GROWTH_MB = 10.0
"""Largest growth of a process after the warm-up; a leak of one batch per step would be greater."""


def processes() -> Iterator[tuple[str, psutil.Process]]:
    """Kind and process of the driver and of the actors that it started."""
    yield "driver", psutil.Process()
    for child in psutil.Process().children(recursive=True):
        title = " ".join(child.cmdline())
        for kind in ("RewardActor", "Engine"):
            if title.startswith("ray::") and kind in title:
                yield kind, child


def object_store_bytes() -> float:
    from ray._private.internal_api import memory_summary

    summary = memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)
    found = [line for line in summary.splitlines() if "Plasma memory usage" in line]
    return float(found[0].split("usage")[1].split("MiB")[0]) if found else 0.0


def test_memory_is_flat(
    ray_local: None,
    tiny_checkpoints: dict[str, str],
    tiny_catalogue_ref: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout_batch, "parse_completions", every_text_counts)
    reward = {"k": 5, "cached_scores": 64, "pool": {"cpus_per_worker": 0.5}}
    settings = {"steps": STEPS, "checkpoint_every": 100, "reward": reward}
    job = small_job(tiny_checkpoints, tiny_catalogue_ref, tmp_path / "soak", **settings)
    sizes: dict[str, list[float]] = {}
    stored: list[float] = []
    with open_trainer(*job) as trainer:
        while trainer.step < STEPS:
            trainer.train_step()
            if trainer.step % EVERY == 0:
                for kind, process in processes():
                    sizes.setdefault(kind, []).append(process.memory_info().rss / 2**20)
                stored.append(object_store_bytes())
    assert set(sizes) == {"driver", "RewardActor", "Engine"}
    later = WARM_UP // EVERY
    growth = {}
    for kind, measured in sizes.items():
        slope, _ = np.polyfit(np.arange(len(measured) - later), measured[later:], 1)
        growth[kind] = float(slope * (len(measured) - later))
    report = {"rss_mb": sizes, "growth_mb": growth, "object_store_mb": stored, "every": EVERY, "warm_up": WARM_UP}
    (ROOT / "runs" / "bench").mkdir(parents=True, exist_ok=True)
    (ROOT / "runs" / "bench" / "soak.json").write_text(json.dumps(report))
    assert all(grown < GROWTH_MB for grown in growth.values()), growth
    assert max(stored[later:]) <= max(stored[:later]) + 1
