"""The fault injector, with a job and processes that are stubs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from tests.faults import harness
from tests.faults.harness import FaultInjector, InjectionResult


@dataclass
class StubProcess:
    pid: int
    exists: bool = True


@dataclass
class StubJob:
    """Runs until `needed` faults were injected; fails `failures` times, and then succeeds."""

    needed: int
    processes: list[StubProcess]
    failures: int = 0
    hit: list[int] = field(default_factory=list)
    started: int = 0

    def start(self) -> None:
        self.started += 1

    def wait(self) -> int:
        while len(self.hit) < self.needed:
            time.sleep(0.001)
        self.failures -= 1
        return 1 if self.failures >= 0 else 0

    def resume(self) -> None:
        self.start()

    def find(self, fault: str) -> list[StubProcess]:
        assert fault == "learner"
        return self.processes

    def commits(self) -> dict[str, str]:
        return {f"stage {len(self.hit)}": "now"}

    def log_tail(self) -> str:
        return "log"

    def inject(self, process: Any) -> None:
        if not process.exists:
            raise psutil.NoSuchProcess(process.pid)
        self.hit.append(process.pid)


@pytest.fixture(autouse=True)
def without_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "DEFAULT_MAX_DELAY_S", 0.0)
    monkeypatch.setattr(harness, "POLL_S", 0.001)


def injector(job: StubJob, times: int, **options: Any) -> FaultInjector:
    return FaultInjector(job, "learner", 0, times, job.inject, **options)  # type: ignore[arg-type]


def test_run_starts_the_job_injects_the_faults_and_reports_them() -> None:
    job = StubJob(needed=2, processes=[StubProcess(3), StubProcess(2)], failures=1)
    found = injector(job, 2).run()
    assert found == InjectionResult(times=2, resumes=1, before={"stage 0": "now", "stage 1": "now"})
    assert job.hit == [3, 2], "the youngest process first, and none twice"
    assert job.started == 2


def test_with_repeat_a_process_may_be_hit_again_after_another_one() -> None:
    job = StubJob(needed=4, processes=[StubProcess(3), StubProcess(2)])
    assert injector(job, 4, repeat=True).run().times == 4
    assert job.hit == [3, 2, 3, 2]


def test_a_job_that_ends_early_has_fewer_faults() -> None:
    job = StubJob(needed=1, processes=[StubProcess(1)])
    assert injector(job, 5).run() == InjectionResult(1, 0, {"stage 0": "now"})


def test_a_process_that_ended_before_the_fault_does_not_count() -> None:
    job = StubJob(needed=0, processes=[StubProcess(1, exists=False)])
    assert injector(job, 1).run() == InjectionResult(0, 0, {})


def test_a_job_that_fails_too_often_is_an_error_and_ends_the_thread() -> None:
    job = StubJob(needed=0, processes=[], failures=99)
    with pytest.raises(AssertionError, match="log"):
        injector(job, 1).run()
