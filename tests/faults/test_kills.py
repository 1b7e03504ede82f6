"""Kill -9 of every kind of process at random moments: the run ends with the numbers of an undisturbed one.

`make chaos TRIALS=20`; each trial is a whole run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import TRIALS, Undisturbed
from tests.faults.harness import TITLES, Job, Outcome, finish, kill, strike

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("seed", range(TRIALS))
@pytest.mark.parametrize("fault", [*TITLES, "driver"])
def test_a_kill_costs_time_and_nothing_else(
    fault: str,
    seed: int,
    undisturbed: Undisturbed,
    staging: Path,
    tmp_path: Path,
    note: Callable[[Outcome], None],
) -> None:
    job = Job(tmp_path / "run", staging)
    began = time.monotonic()
    job.start()
    before = strike(job, fault, seed, kill)
    resumes = finish(job)
    lost = time.monotonic() - began - undisturbed.seconds
    job.check_nothing_is_left()
    after = job.commits()
    assert {name: after[name] for name in before} == before
    assert job.results() == undisturbed.results
    note(Outcome(fault, seed, resumes, lost))
