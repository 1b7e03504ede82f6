"""A whole run with something killed in it, and what must hold afterwards."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from afmrl_ray.cit.stages import RunDirectory, digest_path
from afmrl_ray.config import dump_yaml, validate
from tests.cit.conftest import run_values

ROOT = Path(__file__).resolve().parents[2]
MARK = "AFMRL_FAULT_TRIAL"
PATIENCE_S = 900
COMPARED = ("distill", "attributes-r0", "agcl-r0", "rar-r0", "evaluate-r0")

TITLES = {
    "train worker": r"ray::.*TrainWorker",
    "train controller": r"ray::.*TrainController",
    "rollout actor": r"ray::.*(GenerationEngine|Engine)\b",
    "learner": r"ray::.*_WrappedExecutable",
    "reward actor": r"ray::.*RewardActor",
    "data worker": r"ray::.*MapWorker",
    "raylet": r"/raylet/raylet ",
    "head": r"/gcs/gcs_server ",
}
"""What `ps` shows of a process, by what it is; the driver is found by its id."""


@dataclass(frozen=True)
class Outcome:
    """A trial.

    Attributes:
        fault: what was done.
        seed: of the moment.
        resumes: times that the same command had to be given again.
        lost_s: seconds longer than the undisturbed run.
    """

    fault: str
    seed: int
    resumes: int
    lost_s: float


class Job:
    """`jobs/run_cit.py` on a small run in a folder of its own."""

    def __init__(self, folder: Path, staging: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.mark = uuid.uuid4().hex
        folder.mkdir(parents=True)
        values = run_values(folder, ray={"num_cpus": 4, "object_store_mb": 100})
        values["catalogue"]["staging_dir"] = str(staging)
        values["rar"]["num_learners"] = 1
        values["rar"]["cpus_per_learner"] = 0.5
        self.config = folder / "config.yaml"
        self.config.write_text(dump_yaml(validate(values)))
        self.run = RunDirectory(str(folder), "t")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, "RAY_ADDRESS": "", "PYTHONUNBUFFERED": "1", MARK: self.mark}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs/run_cit.py"), "--config", str(self.config)],
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=PATIENCE_S)

    def told(self) -> str:
        return self.log.read_text()[-3000:]

    def marked(self) -> Iterator[psutil.Process]:
        """Every process that this job started, directly or not, whoever its parent is by now."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue

    def find(self, fault: str) -> psutil.Process | None:
        """A process to do it to."""
        assert self.process is not None
        if fault == "driver":
            return psutil.Process(self.process.pid)
        found = []
        for process in self.marked():
            try:
                if re.search(TITLES[fault], " ".join(process.cmdline()) + " "):
                    found.append(process)
            except psutil.Error:
                continue
        return max(found, key=lambda process: process.pid, default=None)

    def commits(self) -> dict[str, str]:
        """When each stage was committed."""
        records = (self.folder / "t" / "stages").glob("*/stage.json")
        return {path.parent.name: json.loads(path.read_text())["committed_at"] for path in records}

    def results(self) -> dict[str, Any]:
        """Numbers and outputs of the stages that are compared."""
        found = {}
        for name in COMPARED:
            stage = self.run.committed(name)
            assert stage is not None, f"{name} is not committed"
            models = [digest_path(stage.output("model"))] if "model" in stage.outputs else []
            found[name] = json.dumps(stage.metrics, sort_keys=True), models
        return found

    def check_nothing_is_left(self) -> None:
        """See that no process outlives the job."""
        deadline = time.monotonic() + 60
        while left := [" ".join(process.cmdline())[:120] for process in self.marked()]:
            assert time.monotonic() < deadline, f"orphans: {left}"
            time.sleep(1)


def strike(job: Job, fault: str, seed: int, blow: Callable[[psutil.Process], None]) -> dict[str, str]:
    """Do it at a random moment after a target has appeared; what was committed then."""
    dice = random.Random(f"{fault} {seed}")
    # Targets come and go with the stages: which appearance, and when in it.
    skipped, delay = dice.randrange(2) if fault in ("train worker", "data worker") else 0, dice.uniform(0, 4)
    if fault in ("driver", "raylet", "head"):
        delay = dice.uniform(5, 60)
    seen: set[int] = set()
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert job.process is not None
        assert job.process.poll() is None, f"the job ended before anything could be done to it: {job.told()}"
        assert time.monotonic() < deadline, f"no {fault} appeared"
        target = job.find(fault)
        if target is not None and target.pid not in seen:
            seen.add(target.pid)
            if len(seen) > skipped:
                time.sleep(delay)
                before = job.commits()
                try:
                    blow(target)
                except psutil.NoSuchProcess:
                    delay /= 2
                    continue
                return before
        time.sleep(0.1)


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def finish(job: Job, *, resumes: int = 3) -> int:
    """Wait for the end, giving the same command again where it failed; how often that was."""
    given = 0
    while (code := job.wait()) != 0:
        killed = code < 0
        assert killed or "run the same command again to resume" in job.told(), job.told()
        assert given < resumes, job.told()
        given += 1
        job.check_nothing_is_left()
        job.start()
    return given
