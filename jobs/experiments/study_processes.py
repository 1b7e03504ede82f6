"""Runs of a study in processes of their own, several at a time, on one Ray."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from afmrl_ray.cit.driver import own_command
from afmrl_ray.config import Config, dump_yaml, with_values
from jobs.experiments.stages import SharedStart

LOGS = Path("runs/bench/ladder")
"""Default folder of the configs and logs of the processes."""


def run_in_processes(
    configs: Sequence[Config],
    keys: Sequence[str],
    start: SharedStart,
    *,
    train_fraction: float,
    processes: int,
    logs: Path = LOGS,
) -> None:
    """Run the variants in every config's run, `processes` runs at a time; committed stages are skipped.

    Args:
        configs: one config per run, with different `run.name`.
        keys: keys of the variants.
        start: checkpoints and Ray of all runs.
        train_fraction: fraction of the products in the variant with fewer products.
        logs: folder of the processes' configs and logs.

    Raises:
        RuntimeError: some runs failed; the others were finished.
    """
    waiting, failed = list(configs), []
    running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    with tqdm(total=len(waiting), desc="runs") as bar:
        while waiting or running:
            while waiting and len(running) < processes:
                config = waiting.pop(0)
                # Reward actors have names, which are unique within a namespace only.
                values = {**start.values, "ray.namespace": config.run.name}
                started = _start(with_values(config, values), keys, start.dual_encoder, train_fraction, logs)
                running[config.run.name] = started
            time.sleep(1)
            for name, (process, log) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                bar.update()
                if process.returncode:
                    failed.append(f"{name} (see {log})")
                    bar.write(f"failed: {failed[-1]}")
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _start(
    config: Config, keys: Sequence[str], dual_encoder: str | None, train_fraction: float, logs: Path
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a run in a process; returns the process and the path of its log."""
    logs.mkdir(parents=True, exist_ok=True)
    settings, log = logs / f"{config.run.name}.yaml", logs / f"{config.run.name}.log"
    settings.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "jobs.experiments.study_run", "--config", str(settings)]
    # The report names this process's command: the child's own would join a Ray that ends with this process.
    command += ["--train-fraction", str(train_fraction), "--command", own_command()]
    command += ["--dual-encoder", dual_encoder] if dual_encoder is not None else []
    with log.open("ab") as target:
        process = subprocess.Popen([*command, "--variants", *keys], stdout=target, stderr=subprocess.STDOUT)
    return process, log
