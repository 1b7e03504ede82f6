"""A whole run with something killed in it, and what must hold afterwards."""

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
from afmrl_ray.cit.stages import RunDirectory, Stage
from afmrl_ray.config import dump_yaml, validate
from afmrl_ray.training.metrics_log import read_metrics, results_of
from tests.cit.conftest import run_values

ROOT = Path(__file__).resolve().parents[2]
MARK = "AFMRL_FAULT_TRIAL"
PATIENCE_S = 900
A_RUN = 10
"""Trials in one run."""
STEPS = 12
"""Of AGCL and of RAR: enough of them to die amid."""
COMPARED = ("distill", "attributes-r0", "agcl-r0", "rar-r0", "evaluate-r0")
NOT_OF_THE_ALGORITHM = ("time", "reward/service_", "actor/restarts", "rollout/restarts")
"""Numbers of a training that tell when its actors worked and died."""

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

STAGES = {
    "train worker": ("agcl-r0",),
    "train controller": ("agcl-r0",),
    "rollout actor": ("rar-r0",),
    "learner": ("rar-r0",),
    "reward actor": ("rar-r0",),
    "data worker": ("attributes-r0", "evaluate-r0"),
}
"""Where a kind of process is about; the others are about in all stages."""

LIFE_S = {"driver": 60.0, "reward actor": 4.0}
"""A blow falls up to so many seconds after its target was seen; for most kinds `A_WHILE_S`."""
A_WHILE_S = 12.0


@dataclass(frozen=True)
class Outcome:
    """Trials in one run.

    Attributes:
        fault: what was done.
        seed: of the moments.
        trials: times that it was done.
        resumes: times that the same command had to be given again.
        lost_s: seconds that each cost, against the undisturbed run.
    """

    fault: str
    seed: int
    trials: int
    resumes: int
    lost_s: float


@dataclass(frozen=True)
class InjectionResult:
    """What was done to one job.

    Attributes:
        times: trials.
        resumes: times that the same command was given again.
        before: stages that were committed at some trial, with the time of their commit.
    """

    times: int
    resumes: int
    before: dict[str, str]


started: list[Job] = []


class Job:
    """`jobs/run_cit.py` on a small run in a folder of its own.

    Args:
        folder: of the run, its config and its log.
        staging: of the catalogue, shared by all jobs.
        storage_path: of the run; none = `folder`.
        reward: changes of `rar.reward`.
        environment: of the driver; none = a local Ray of its own.
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
        values["rar"]["max_learner_restarts"] = A_RUN
        values["rar"]["rollout"]["max_restarts"] = values["agcl"]["workers"]["max_failures"] = A_RUN
        values["rar"]["reward"] |= reward or {}
        self.config = folder / "config.yaml"
        self.config.write_text(dump_yaml(validate(values)))
        started.append(self)
        self.process: subprocess.Popen[bytes] | None = None

    def begin_from(self, finished: Path, again: Iterable[str]) -> None:
        """Take over the stages of a finished run, but for those to be made again."""
        shutil.copytree(finished / "t", self.folder / "t")
        for name in again:
            shutil.rmtree(self.folder / "t" / "stages" / name)

    def start(self) -> None:
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
        assert self.process is not None
        return self.process.wait(timeout=PATIENCE_S)

    def lives(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def resume(self) -> None:
        """Give the same command again, after a death or where the job told to."""
        code = self.wait()
        assert code < 0 or "run the same command again to resume" in self.told(), self.told()
        self.check_nothing_is_left()
        self.start()

    def told(self) -> str:
        """The end of the log, without the escapes that move a terminal's cursor among progress bars."""
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.log.read_text()[-6000:])

    def marked(self) -> Iterator[psutil.Process]:
        """Every process that this job started, directly or not, whoever its parent is by now."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue

    def find(self, fault: str) -> list[psutil.Process]:
        """Processes to do it to, the youngest first."""
        assert self.process is not None
        if fault == "driver":
            return [psutil.Process(self.process.pid)] if self.lives() else []
        return find_title(self.marked(), TITLES[fault])

    def commits(self) -> dict[str, str]:
        """When each stage was committed."""
        return {stage.name: stage.committed_at for stage in self.run.stages()}

    def check_stages_stand(self, before: dict[str, str]) -> None:
        """See that stages committed before a trial were not made again."""
        after = self.commits()
        assert {name: after.get(name) for name in before} == before

    def results(self) -> dict[str, Any]:
        """Numbers and outputs of the stages that are compared."""
        found = {}
        for name in COMPARED:
            stage = self.run.committed(name)
            assert stage is not None, f"{name} is not committed"
            numbers = {key: value for key, value in stage.metrics.items() if not key.startswith(NOT_OF_THE_ALGORITHM)}
            found[name] = json.dumps(numbers, sort_keys=True), self._weights(stage)
        found["steps of rar-r0"] = self._steps("rar-r0")
        return found

    def _steps(self, name: str) -> list[dict[str, float]]:
        """What a training logged: each step once, with the rewards that it learned from, whatever died amid it."""
        stage = self.run.committed(name)
        assert stage is not None
        return [
            {
                "step": record["step"],
                **{key: value for key, value in results_of(record).items() if not key.startswith(NOT_OF_THE_ALGORITHM)},
            }
            for record in read_metrics(storage.join(stage.directory, "log"))
        ]

    @staticmethod
    def _weights(stage: Stage) -> dict[str, str]:
        """Digests of a model's tensors; an adapter's other files name the folder of its base."""
        if "model" not in stage.outputs:
            return {}
        model = stage.output("model")
        files = [name for name in storage.list_files(model) if name.endswith(".safetensors")]
        return {name: storage.digest_file(storage.join(model, name)) for name in files}

    def end(self) -> None:
        """End whatever is left, for tests that fail amid a run."""
        for process in self.marked():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def check_nothing_is_left(self) -> None:
        """See that no process outlives the job."""
        deadline = time.monotonic() + 60
        while left := [" ".join(process.cmdline())[:120] for process in self.marked()]:
            assert time.monotonic() < deadline, f"orphans: {left}"
            time.sleep(1)


class FaultInjector(threading.Thread):
    """Does something to a kind of process, at random moments while a job runs, until that was done `times` times.

    Args:
        job: not started yet.
        fault: whom it is done to, of `TITLES`, or `driver`.
        seed: of the moments.
        times: trials; fewer where the job ends first.
        blow: what is done.
        again: whether to the same process too, after it was done to another.

    Attributes:
        given: trials so far.
        before: stages that were committed at some blow, with the time of their commit.
    """

    def __init__(
        self,
        job: Job,
        fault: str,
        seed: int,
        times: int,
        blow: Callable[[psutil.Process], None] | None = None,
        *,
        again: bool = False,
    ) -> None:
        super().__init__(name=f"fault injection: {fault}", daemon=True)
        self._job, self._fault, self._times, self._blow = job, fault, times, blow or kill
        self._again = again
        self._dice = random.Random(f"{fault} {seed}")
        self._over = threading.Event()
        self.given = 0
        self.before: dict[str, str] = {}

    def run(self) -> None:
        struck: set[int] = set()
        while self.given < self._times and not self._over.is_set():
            target = next((process for process in self._job.find(self._fault) if process.pid not in struck), None)
            if target is None:
                self._over.wait(0.2)
                continue
            self._over.wait(self._dice.uniform(0, LIFE_S.get(self._fault, A_WHILE_S)))
            before = self._job.commits()
            try:
                self._blow(target)
            except psutil.NoSuchProcess:
                continue
            if self._again:
                struck.clear()
            struck.add(target.pid)
            self.before |= before
            self.given += 1

    def run_job(self) -> InjectionResult:
        """Start the job, and see it through to its end while faults are injected."""
        self._job.start()
        self.start()
        resumes = finish(self._job)
        self._over.set()
        self.join()
        return InjectionResult(self.given, resumes, self.before)


def find_title(processes: Iterable[psutil.Process], title: str) -> list[psutil.Process]:
    """Those whose line in `ps` matches, the youngest first."""
    found = []
    for process in processes:
        try:
            if re.search(title, " ".join(process.cmdline()) + " "):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid, reverse=True)


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def finish(job: Job, *, resumes: int = A_RUN) -> int:
    """Wait for the end, giving the same command again where it failed; how often that was."""
    given = 0
    while job.wait() != 0:
        assert given < resumes, job.told()
        given += 1
        job.resume()
    return given
