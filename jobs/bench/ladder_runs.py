"""Runs of ladders side by side: what all of them begin with, and a process for each on one Ray."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from afmrl_ray.cit.driver import open_run, own_command, record_whole
from afmrl_ray.cit.ladder import DUAL_ENCODERS, Ladder
from afmrl_ray.cit.pipeline import Pipeline
from afmrl_ray.config import Config, dump_yaml, with_values
from afmrl_ray.report import write_report

log = logging.getLogger("afmrl_ray.ladder")

LOGS = Path("runs/bench/ladder")
_CLIMB = Path(__file__).with_name("ladder_climb.py")


@dataclass(frozen=True)
class Beginning:
    """What all runs begin with.

    Attributes:
        values: dotted settings: the models' checkpoints and the Ray to join.
        clip: checkpoint of the dual encoders, or none where no rung has one.
    """

    values: dict[str, Any]
    clip: str | None


def begin(start: Pipeline, rungs: Sequence[str]) -> Beginning:
    """Make the checkpoints in the run that is open: there is one of each model, whatever the seed."""
    import ray

    config, clip = start.config, None
    values = {"encoder.path": start.encoder_base, "generator.path": start.generator_base}
    if set(rungs) & set(DUAL_ENCODERS):
        changes = {
            **DUAL_ENCODERS["clip"],
            **values,
            "encoder.path": None,
            "catalogue.path": start.catalogue_ref.path,
            "run.name": f"{config.run.name}-clip",
        }
        with open_run(with_values(config, changes)) as tower:
            clip = tower.encoder_base
    return Beginning({**values, "ray.address": ray.get_runtime_context().gcs_address}, clip)


def run_side_by_side(
    configs: Sequence[Config], rungs: Sequence[str], beginning: Beginning, *, share: float, processes: int
) -> None:
    """Climb the rungs of every config's run, `processes` runs at a time; what is committed is skipped.

    Raises:
        RuntimeError: some failed; the others were finished.
    """
    waiting, failed = list(configs), []
    running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    with tqdm(total=len(waiting), desc="runs") as bar:
        while waiting or running:
            while waiting and len(running) < processes:
                config = waiting.pop(0)
                # Reward actors are named in a namespace, which each run has to itself.
                values = {**beginning.values, "ray.namespace": config.run.name}
                running[config.run.name] = _start(with_values(config, values), rungs, beginning.clip, share)
            time.sleep(1)
            for name, (process, logged) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                bar.update()
                if process.returncode:
                    failed.append(f"{name} (see {logged})")
                    bar.write(f"failed: {failed[-1]}")
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _start(
    config: Config, rungs: Sequence[str], clip: str | None, share: float
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a run in a process of its own; returns it and its log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    settings, logged = LOGS / f"{config.run.name}.yaml", LOGS / f"{config.run.name}.log"
    settings.write_text(dump_yaml(config))
    command = [sys.executable, str(_CLIMB), "--config", str(settings), "--share", str(share)]
    # The child's own would join a Ray that ends with this process.
    command += ["--command", own_command()]
    command += ["--clip", clip] if clip is not None else []
    with logged.open("ab") as target:
        process = subprocess.Popen([*command, "--rungs", *rungs], stdout=target, stderr=subprocess.STDOUT)
    return process, logged


def climb(config: Config, rungs: Sequence[str], *, clip: str | None, share: float, command: str | None) -> None:
    """The rungs of one run, in this process, and its report, which tells the command that the runs are made by.

    Args:
        command: none = this process's own.
    """
    with open_run(config) as pipeline:
        record_whole(pipeline.run, command or own_command())
        _ = pipeline.floor
        ladder = Ladder(pipeline, clip_path=clip, share=share)
        for key in rungs:
            began = time.monotonic()
            stage = ladder.climb(key)
            hit = stage.metrics["protocols"][config.evaluation.primary_protocol]["metrics"]["hit@1"]["mean"]
            log.info("rung %s: hit@1 %.1f %%, after %.0f s", key, 100 * hit, time.monotonic() - began)
        write_report(pipeline.run, items=pipeline.catalogue)
