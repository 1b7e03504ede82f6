"""AGCL on a real Ray Train worker group: run again after its end, and with a worker that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from afmrl_ray import storage
from afmrl_ray.agcl.train import AGCLJob, train_agcl
from afmrl_ray.config import Config, validate
from afmrl_ray.training.metrics_log import read_metrics
from tests.cit.conftest import run_values

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def config_of(folder: Path, steps: int) -> Config:
    values = run_values(folder)
    values["agcl"].update(steps=steps, lexical={"enabled": False})
    values["agcl"]["workers"].update(checkpoint_every=2, peak_tflops=0.5)
    return validate(values)


def train(folder: Path, checkpoints: dict[str, str], ref, steps: int) -> tuple[dict[str, float], bytes]:
    job = AGCLJob(checkpoints["encoder"], None, ref, str(folder / "attempt"), "agcl-test")
    metrics = train_agcl(config_of(folder, steps), job)
    return metrics, storage.read_bytes(str(folder / "attempt/model/adapter_model.safetensors"))


def kill_a_worker_after(first_checkpoint: Path) -> None:
    while not first_checkpoint.exists():
        time.sleep(0.05)
    # The controller registers the checkpoint a moment after it appears.
    time.sleep(2)
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
    os.kill(workers[-1].pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_finished_training_run_again_returns_the_same_without_a_step(
    ray_local, tiny_checkpoints, tiny_catalogue_ref, tmp_path
):
    first = train(tmp_path, tiny_checkpoints, tiny_catalogue_ref, 4)
    assert first[0]["train/grad_norm"] > 0
    last = read_metrics(str(tmp_path / "attempt/log"))[-1]
    assert last["time/mfu"] == pytest.approx(last["time/tflops_per_second"] / 0.5)
    assert last["time/tflops_per_second"] == pytest.approx(last["data/tflop"] / last["time/step"])
    assert last["time/samples_per_second"] == pytest.approx(last["data/samples"] / last["time/step"])
    steps = storage.read_bytes(str(tmp_path / "attempt/log/metrics.jsonl"))
    assert train(tmp_path, tiny_checkpoints, tiny_catalogue_ref, 4) == first
    assert storage.read_bytes(str(tmp_path / "attempt/log/metrics.jsonl")) == steps


@pytest.mark.slow
def test_a_killed_worker_changes_no_result(ray_local, tiny_checkpoints, tiny_catalogue_ref, tmp_path):
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    calm = train(tmp_path / "calm", tiny_checkpoints, tiny_catalogue_ref, 80)
    first = tmp_path / "killed/attempt/train/agcl-test/step_0000002"
    killer = threading.Thread(target=kill_a_worker_after, args=(first,), daemon=True)
    killer.start()
    killed = train(tmp_path / "killed", tiny_checkpoints, tiny_catalogue_ref, 80)
    killer.join(timeout=1)
    assert not killer.is_alive()
    assert killed == calm
