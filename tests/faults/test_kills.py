"""SIGKILL of every kind of process at random moments: the run ends with the results of an undisturbed run.

`make chaos TRIALS=20`. Each run has up to `TRIALS_PER_RUN` kills. Stages during which the killed process does not run
are copied from the undisturbed run.
"""

from __future__ import annotations

import pytest

from tests.faults.conftest import Trials
from tests.faults.harness import COMPARED, STAGES, FaultInjector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]


@pytest.mark.parametrize("fault", [*STAGES, "driver"])
def test_results_do_not_depend_on_killed_processes(fault: str, trials: Trials) -> None:
    trials(fault, STAGES.get(fault, COMPARED), lambda job, seed, times: FaultInjector(job, fault, seed, times).run())
