"""Actors that neither die nor answer in time: a runner that is 20 times slower, a reward actor that stands still."""

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

SLOWNESS = 20
TURN_S = 0.2
TWO = {"timeout_s": 5, "start_timeout_s": 40, "pool": {"num_workers": 2, "cpus_per_worker": 0.25}}
"""Reward actors, one of which must answer in time; where one never begins, the job ends and names it."""


class Dragged(threading.Thread):
    """Lets a kind of process run for one part in `SLOWNESS` of the time.

    Attributes:
        seconds: that one of them was held back.
    """

    def __init__(self, job: Job, fault: str) -> None:
        super().__init__(name=f"drags {fault}", daemon=True)
        self._job, self._fault = job, fault
        self._over = threading.Event()
        self.seconds = 0.0

    def run(self) -> None:
        target: psutil.Process | None = None
        while not self._over.is_set():
            if target is None or not target.is_running():
                target = next(iter(self._job.find(self._fault)), None)
                self._over.wait(0.0 if target else 0.2)
                continue
            try:
                target.send_signal(signal.SIGSTOP)
                self._over.wait(TURN_S * (1 - 1 / SLOWNESS))
                self.seconds += TURN_S * (1 - 1 / SLOWNESS)
                target.send_signal(signal.SIGCONT)
            except psutil.NoSuchProcess:
                target = None
            self._over.wait(TURN_S / SLOWNESS)

    def end(self) -> None:
        self._over.set()
        self.join()


def test_a_runner_20_times_slower_changes_no_number(
    undisturbed: Undisturbed,
    calm: Callable[[Iterable[str]], float],
    staging: Path,
    tmp_path: Path,
    note: Callable[[Outcome], None],
) -> None:
    calm_s = calm(["rar-r0"])
    job = Job(tmp_path / "run", staging)
    job.begin_from(undisturbed.folder, ["rar-r0"])
    began = time.monotonic()
    job.start()
    dragged = Dragged(job, "rollout actor")
    dragged.start()
    assert job.wait() == 0, job.told()
    lost_s = time.monotonic() - began - calm_s
    dragged.end()
    assert dragged.seconds > 1
    assert job.results() == undisturbed.results
    note(Outcome("runner 20 times slower", 0, 1, 0, lost_s))


def test_a_hung_reward_actor_is_passed_over(trials: Trials) -> None:
    def hang(job: Job, seed: int, times: int) -> InjectionResult:
        return FaultInjector(job, "reward actor", seed, times, one_at_a_time(), again=True).run()

    trials("hung reward actor", ["rar-r0"], hang, reward=TWO)


def one_at_a_time() -> Callable[[psutil.Process], None]:
    """A blow after which a process stands still, and the one that stood still before goes on."""
    hung: list[psutil.Process] = []

    def stand_still(process: psutil.Process) -> None:
        for other in hung:
            with contextlib.suppress(psutil.NoSuchProcess):
                other.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGSTOP)
        hung[:] = [process]

    return stand_still
