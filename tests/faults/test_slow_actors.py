"""Actors that are alive but slow: a rollout actor that is 20 times slower, and a reward actor that hangs."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import Trials, Undisturbed
from tests.faults.harness import FaultInjector, InjectionResult, Job, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * 3600)]

SLOWDOWN = 20
PERIOD_S = 0.2
TWO_REWARD_ACTORS = {"timeout_s": 5, "start_timeout_s": 40, "pool": {"num_workers": 2, "cpus_per_worker": 0.25}}
"""Settings with two reward actors, one of which must answer in time."""


class Slowdown:
    """Lets one kind of process run for only 1 / `SLOWDOWN` of the time, by stopping and continuing it.

    Attributes:
        seconds: total time for which a process was stopped.
    """

    def __init__(self, job: Job, fault: str) -> None:
        self._job, self._fault = job, fault
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._slow_down, name=f"slowdown: {fault}", daemon=True)
        self.seconds = 0.0

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _slow_down(self) -> None:
        target: psutil.Process | None = None
        while not self._ended.is_set():
            if target is None or not target.is_running():
                target = next(iter(self._job.find(self._fault)), None)
                self._ended.wait(0.0 if target else 0.2)
                continue
            try:
                target.send_signal(signal.SIGSTOP)
                self._ended.wait(PERIOD_S * (1 - 1 / SLOWDOWN))
                self.seconds += PERIOD_S * (1 - 1 / SLOWDOWN)
                target.send_signal(signal.SIGCONT)
            except psutil.NoSuchProcess:
                target = None
            self._ended.wait(PERIOD_S / SLOWDOWN)


def test_results_do_not_depend_on_a_rollout_actor_that_is_20_times_slower(
    undisturbed: Undisturbed,
    undisturbed_seconds: Callable[[Iterable[str]], float],
    staging: Path,
    tmp_path: Path,
    record_outcome: Callable[[Outcome], None],
) -> None:
    expected_s = undisturbed_seconds(["rar-r0"])
    job = Job(tmp_path / "run", staging)
    job.copy_stages(undisturbed.folder, ["rar-r0"])
    began = time.monotonic()
    job.start()
    slowdown = Slowdown(job, "rollout actor")
    slowdown.start()
    assert job.wait() == 0, job.log_tail()
    lost_s = time.monotonic() - began - expected_s
    slowdown.end()
    assert slowdown.seconds > 1
    assert job.results() == undisturbed.results
    record_outcome(Outcome("rollout actor 20 times slower", 0, 1, 0, lost_s))


def test_results_do_not_depend_on_a_hung_reward_actor(trials: Trials) -> None:
    def hang(job: Job, seed: int, times: int) -> InjectionResult:
        return FaultInjector(job, "reward actor", seed, times, hang_one_at_a_time(), repeat=True).run()

    trials("hung reward actor", ["rar-r0"], hang, reward=TWO_REWARD_ACTORS)


def hang_one_at_a_time() -> Callable[[psutil.Process], None]:
    """A fault that stops a process, and continues the one that was stopped before."""
    hung: list[psutil.Process] = []

    def hang(process: psutil.Process) -> None:
        for other in hung:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGSTOP)
        hung[:] = [process]

    return hang
