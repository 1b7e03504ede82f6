"""A training of seconds on Ray Train that can be killed at a chosen step and records the steps that it ran."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed as dist
from torch import nn

from afmrl_ray.config.cluster import WorkersConfig
from afmrl_ray.config.models import OptimizerConfig
from afmrl_ray.errors import UserError
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.fit import fit, run_steps, worker_threads

OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="linear", warmup_ratio=0.25, max_grad_norm=0.5)
EVERY = 2
STEPS = 8


def train(folder: str, *, at: int = -1, event: str = "", **workers: Any) -> Any:
    """Train below `folder`; returns Ray Train's result.

    Args:
        at: step before whose work `event` happens, once per folder. After `EVERY` steps a report has just returned.
        event: `stop`, the name of what is killed (`worker` or `controller`), or `wait` to be killed from outside.
        workers: `WorkersConfig`.
    """
    payload = {"folder": folder, "at": at, "event": event}
    config = WorkersConfig(**{"checkpoint_every": EVERY, "cpus_per_worker": 0.5, **workers})
    return fit(train_loop, {**payload, "workers": config}, name="toy", directory=f"{folder}/train", workers=config)


def toy_model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 1))
    net[0].requires_grad_(False)
    return net


def train_loop(payload: dict[str, Any]) -> None:
    workers: WorkersConfig = payload["workers"]
    worker_threads(workers)
    folder, rank, world = Path(payload["folder"]), dist.get_rank(), dist.get_world_size()
    net = toy_model()
    engine = Engine(net, OPTIMIZER, steps=STEPS, zero_stage=workers.zero_stage)

    def train_step(step: int) -> dict[str, float]:
        if step == payload["at"] and rank == world - 1 and not (folder / "happened").exists():
            (folder / "happened").touch()
            happen(payload["event"])
        batch = torch.randn(12, 6, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        loss = engine(batch).square().mean()
        engine.backward(loss)
        # All ranks have contributed their gradients, so this step is done.
        if rank == 0:
            with (folder / "steps").open("a") as file:
                file.write(f"{step} {world}\n")
        return {"train/loss": float(loss)}

    def save_model(path: str) -> None:
        with engine.whole_parameters():
            if rank == 0:
                os.makedirs(path)
                torch.save([p.detach().clone() for p in net.parameters()], f"{path}/weights.pt")

    run_steps(
        engine,
        train_step,
        steps=STEPS,
        seed=0,
        workers=workers,
        log_directory=str(folder / "log"),
        label="toy",
        save_model=save_model,
    )


def happen(event: str) -> None:
    """End this worker or Ray Train's controller, raise, or wait."""
    if event == "stop":
        raise UserError("stopped as asked")
    if event == "worker":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "controller":
        (controller,) = (p for p in psutil.Process(os.getppid()).children() if "TrainController" in p.name())
        controller.kill()
    time.sleep(120)


def final_weights(folder: Path) -> list[torch.Tensor]:
    return torch.load(folder / f"train/toy/step_{STEPS:07d}/model/weights.pt")


def steps_done(folder: Path) -> list[tuple[int, int]]:
    """Step and number of workers of every training step, repetitions included, in order."""
    return [(int(step), int(world)) for step, world in (line.split() for line in (folder / "steps").open())]


def relative_to_update(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Distance of the weights relative to that from the initial ones."""
    start = nn.utils.parameters_to_vector(toy_model().parameters()).detach()
    ours_flat, theirs_flat = (torch.cat([tensor.flatten() for tensor in found]) for found in (ours, theirs))
    return float((ours_flat - theirs_flat).norm() / (theirs_flat - start).norm())


def own_session(folder: str) -> None:
    """Train on a Ray of this process, which the test kills after the second report."""
    from afmrl_ray.config.cluster import RayConfig
    from afmrl_ray.training.cluster import ray_session

    with ray_session(RayConfig(num_cpus=2, object_store_mb=100)):
        train(folder, at=2 * EVERY, event="wait", num_workers=2)


def lose_a_node(folder: str) -> None:
    """Train on two nodes, one worker each, and remove one after the second report."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    node = cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False)

    def lose() -> None:
        while not (Path(folder) / "happened").exists():
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    train(folder, at=2 * EVERY, event="wait", num_workers=2, min_workers=1, cpus_per_worker=1)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    {"own_session": own_session, "lose_a_node": lose_a_node}[sys.argv[1]](sys.argv[2])
