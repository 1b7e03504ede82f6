"""Kill -9 of every kind of process at random moments: the run ends with the numbers of an undisturbed one.

`make chaos TRIALS=20`; a run takes up to ten kills, and there are as many runs
as it takes. Stages without the process that is killed are taken over from
the undisturbed run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.faults.conftest import FIRST_SEED, TRIALS, Undisturbed
from tests.faults.harness import A_RUN, COMPARED, STAGES, Blows, Job, Outcome, finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]


@pytest.mark.parametrize("fault", [*STAGES, "driver"])
def test_kills_cost_time_and_nothing_else(
    fault: str,
    undisturbed: Undisturbed,
    calm: Callable[[Iterable[str]], float],
    staging: Path,
    tmp_path: Path,
    note: Callable[[Outcome], None],
) -> None:
    again = STAGES.get(fault, COMPARED)
    calm_s = calm(again)
    given, seed = 0, FIRST_SEED
    while given < TRIALS:
        job = Job(tmp_path / f"run{seed}", staging)
        job.begin_from(undisturbed.folder, again)
        began = time.monotonic()
        job.start()
        blows = Blows(job, fault, seed, min(A_RUN, TRIALS - given))
        blows.start()
        resumes = finish(job)
        lost_s = time.monotonic() - began - calm_s
        blows.end()
        assert blows.given, f"no {fault} was seen"
        job.check_nothing_is_left()
        after = job.commits()
        assert {name: after[name] for name in blows.before} == blows.before
        assert job.results() == undisturbed.results
        note(Outcome(fault, seed, blows.given, resumes, lost_s / blows.given))
        given += blows.given
        seed += 1
