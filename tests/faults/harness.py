"""Fault injection into a whole run, and checks of the run afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from afmrl_ray import storage
from afmrl_ray.config import dump_yaml, validate
from afmrl_ray.runs import RunDirectory, Stage
from afmrl_ray.training.metrics_log import read_metrics, results_of
from tests.cit.conftest import run_values

ROOT = Path(__file__).resolve().parents[2]
MARK = "AFMRL_FAULT_TRIAL"
TIMEOUT_S = 900
TRIALS_PER_RUN = 10
STEPS = 12
"""Training steps of AGCL and of RAR, enough for faults to occur during them."""
COMPARED = ("distill", "attributes-r0", "agcl-r0", "rar-r0", "evaluate-r0")
RUNTIME_METRICS = ("time", "reward/service_", "actor/restarts", "rollout/restarts")
"""Prefixes of metrics that depend on timing and on faults, and are not compared."""

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
"""Regular expression for a process's command line, by kind; the driver is found by its process id."""

STAGES = {
    "train worker": ("agcl-r0",),
    "train controller": ("agcl-r0",),
    "rollout actor": ("rar-r0",),
    "learner": ("rar-r0",),
    "reward actor": ("rar-r0",),
    "data worker": ("attributes-r0", "evaluate-r0"),
}
"""Stages during which a kind of process runs; the other kinds run during all stages."""

MAX_DELAY_S = {"driver": 60.0, "reward actor": 4.0}
DEFAULT_MAX_DELAY_S = 12.0
"""Longest delay between finding a process and injecting the fault."""
POLL_S = 0.2
"""Seconds between searches for a process."""


@dataclass(frozen=True)
class Outcome:
    """Faults injected into one run.

    Attributes:
        fault: kind of fault.
        seed: of the moments.
        trials: number of faults injected.
        resumes: number of times that the command had to be run again.
        lost_s: mean seconds lost by a fault, compared with the undisturbed run.
    """

    fault: str
    seed: int
    trials: int
    resumes: int
    lost_s: float


@dataclass(frozen=True)
class InjectionResult:
    """Faults injected into one job.

    Attributes:
        times: number of faults injected.
        resumes: number of times that the command was run again.
        before: stages that were committed before some fault, with the time of their commit.
    """

    times: int
    resumes: int
    before: dict[str, str]


started_jobs: list[Job] = []


class Job:
    """`jobs/run_cit.py` for a small run in a separate folder.

    Args:
        folder: of the run, its config and its log.
        staging: cache folder of the catalogue, shared by all jobs.
        storage_path: of the run; none = `folder`.
        reward: changes of `rar.reward`.
        environment: of the driver; none = that of this process, with a separate local Ray.
    """

    def __init__(
        self,
        folder: Path,
        staging: Path,
        *,
        storage_path: str | None = None,
        reward: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.log = folder, folder / "log"
        self.mark = uuid.uuid4().hex
        self._environment = environment or {**os.environ, "RAY_ADDRESS": ""}
        folder.mkdir(parents=True)
        self.run = RunDirectory(storage_path or str(folder), "t")
        values = run_values(folder, ray={"num_cpus": 4, "object_store_mb": 100})
        values["run"]["storage_path"] = storage_path or str(folder)
        values["catalogue"]["cache_dir"] = str(staging)
        values["agcl"]["steps"] = values["rar"]["steps"] = STEPS
        values["rar"]["num_learners"] = 1
        values["rar"]["cpus_per_learner"] = 0.5
        values["rar"]["max_learner_restarts"] = TRIALS_PER_RUN
        values["rar"]["rollout"]["max_restarts"] = values["agcl"]["workers"]["max_failures"] = TRIALS_PER_RUN
        values["rar"]["reward"] |= reward or {}
        self.config = folder / "config.yaml"
        self.config.write_text(dump_yaml(validate(values)))
        started_jobs.append(self)
        self.process: subprocess.Popen[bytes] | None = None

    def copy_stages(self, finished: Path, again: Iterable[str]) -> None:
        """Copy the stages of a finished run, except those to be run again."""
        shutil.copytree(finished / "t", self.folder / "t")
        for name in again:
            shutil.rmtree(self.folder / "t" / "stages" / name)

    def start(self) -> None:
        """Start the driver."""
        environment = {**self._environment, "PYTHONUNBUFFERED": "1", MARK: self.mark}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs/run_cit.py"), "--config", str(self.config)],
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )

    def wait(self) -> int:
        """Wait for the driver to exit; its exit code."""
        assert self.process is not None
        return self.process.wait(timeout=TIMEOUT_S)

    def is_running(self) -> bool:
        """Whether the driver is running."""
        assert self.process is not None
        return self.process.poll() is None

    def resume(self) -> None:
        """Run the command again after the driver was killed, or exited with a request to resume."""
        code = self.wait()
        assert code < 0 or "run the same command again to resume" in self.log_tail(), self.log_tail()
        self.check_nothing_is_left()
        self.start()

    def log_tail(self) -> str:
        """The end of the log, without terminal escape sequences."""
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.log.read_text()[-6000:])

    def marked(self) -> Iterator[psutil.Process]:
        """All processes that this job started, directly or indirectly, whatever their parent is now."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue

    def find(self, fault: str) -> list[psutil.Process]:
        """Processes of a kind, the youngest first."""
        assert self.process is not None
        if fault == "driver":
            return [psutil.Process(self.process.pid)] if self.is_running() else []
        return find_title(self.marked(), TITLES[fault])

    def commits(self) -> dict[str, str]:
        """Commit time of each committed stage."""
        return {stage.name: stage.committed_at for stage in self.run.stages()}

    def check_stages_unchanged(self, before: dict[str, str]) -> None:
        """Check that stages committed before a fault were not run again."""
        after = self.commits()
        assert {name: after.get(name) for name in before} == before

    def results(self) -> dict[str, Any]:
        """Metrics and weights of the stages in `COMPARED`."""
        found = {}
        for name in COMPARED:
            stage = self.run.committed(name)
            assert stage is not None, f"{name} is not committed"
            numbers = {key: value for key, value in stage.metrics.items() if not key.startswith(RUNTIME_METRICS)}
            found[name] = json.dumps(numbers, sort_keys=True), self._weights(stage)
        found["steps of rar-r0"] = self._steps("rar-r0")
        return found

    def _steps(self, name: str) -> list[dict[str, float]]:
        """The log of a training: each step once, with the metrics that depend on the algorithm alone."""
        stage = self.run.committed(name)
        assert stage is not None
        return [
            {
                "step": record["step"],
                **{key: value for key, value in results_of(record).items() if not key.startswith(RUNTIME_METRICS)},
            }
            for record in read_metrics(storage.join(stage.directory, "log"))
        ]

    @staticmethod
    def _weights(stage: Stage) -> dict[str, str]:
        """Digests of a model's tensor files; an adapter's other files contain the folder of its base model."""
        if "model" not in stage.outputs:
            return {}
        model = stage.output("model")
        files = [name for name in storage.list_files(model) if name.endswith(".safetensors")]
        return {name: storage.digest_file(storage.join(model, name)) for name in files}

    def kill_all(self) -> None:
        """Kill the remaining processes, for tests that fail during a run."""
        for process in self.marked():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def check_nothing_is_left(self) -> None:
        """Check that no process of the job is left."""
        deadline = time.monotonic() + 60
        while left := [" ".join(process.cmdline())[:120] for process in self.marked()]:
            assert time.monotonic() < deadline, f"orphans: {left}"
            time.sleep(1)


class FaultInjector:
    """Injects a fault into one kind of process at random moments while a job runs, until that was done `times` times.

    Args:
        job: not started yet.
        fault: kind of process, a key of `TITLES`, or `driver`.
        seed: of the moments.
        times: number of faults; fewer are injected if the job ends first.
        inject: the fault; none = SIGKILL.
        repeat: whether a process may be chosen again after another one was.
    """

    def __init__(
        self,
        job: Job,
        fault: str,
        seed: int,
        times: int,
        inject: Callable[[psutil.Process], None] | None = None,
        *,
        repeat: bool = False,
    ) -> None:
        self._job, self._fault, self._times, self._inject = job, fault, times, inject or kill
        self._repeat = repeat
        self._random = random.Random(f"{fault} {seed}")
        self._ended = threading.Event()
        self._injected = 0
        self._before: dict[str, str] = {}

    def run(self) -> InjectionResult:
        """Start the job and wait for its end, resuming it after failures, while a thread injects faults."""
        thread = threading.Thread(target=self._inject_all, name=f"fault injection: {self._fault}", daemon=True)
        self._job.start()
        thread.start()
        try:
            resumes = finish(self._job)
        finally:
            self._ended.set()
            thread.join()
        return InjectionResult(self._injected, resumes, self._before)

    def _inject_all(self) -> None:
        hit: set[int] = set()
        while self._injected < self._times and not self._ended.is_set():
            target = next((process for process in self._job.find(self._fault) if process.pid not in hit), None)
            if target is None:
                self._ended.wait(POLL_S)
                continue
            self._ended.wait(self._random.uniform(0, MAX_DELAY_S.get(self._fault, DEFAULT_MAX_DELAY_S)))
            before = self._job.commits()
            try:
                self._inject(target)
            except psutil.NoSuchProcess:
                continue
            if self._repeat:
                hit.clear()
            hit.add(target.pid)
            self._before |= before
            self._injected += 1


def find_title(processes: Iterable[psutil.Process], title: str) -> list[psutil.Process]:
    """Processes whose command line matches a regular expression, the youngest first."""
    found = []
    for process in processes:
        try:
            if re.search(title, " ".join(process.cmdline()) + " "):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid, reverse=True)


def kill(process: psutil.Process) -> None:
    """Send SIGKILL."""
    process.send_signal(signal.SIGKILL)


def finish(job: Job, *, resumes: int = TRIALS_PER_RUN) -> int:
    """Wait until the job succeeds, resuming it after failures; the number of resumes.

    Raises:
        AssertionError: it failed more than `resumes` times.
    """
    done = 0
    while job.wait() != 0:
        assert done < resumes, job.log_tail()
        done += 1
        job.resume()
    return done
