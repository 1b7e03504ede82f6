"""Kill -9 of every kind of process at random moments: the run ends with the numbers of an undisturbed one.

`make chaos TRIALS=20`; a run takes up to ten kills, and there are as many runs
as it takes. Stages without the process that is killed are taken over from
the undisturbed run.
"""

from __future__ import annotations

import pytest

from tests.faults.conftest import Trials
from tests.faults.harness import COMPARED, STAGES, FaultInjector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]


@pytest.mark.parametrize("fault", [*STAGES, "driver"])
def test_kills_cost_time_and_nothing_else(fault: str, trials: Trials) -> None:
    trials(fault, STAGES.get(fault, COMPARED), lambda job, seed, times: FaultInjector(job, fault, seed, times).run())
