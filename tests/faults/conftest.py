"""The undisturbed run that runs with faults are compared with, and the summary table of faults."""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.faults.harness import ROOT, TRIALS_PER_RUN, InjectionResult, Job, Outcome, started_jobs

TRIALS = int(os.environ.get("AFMRL_TRIALS", "1"))
"""Number of trials of each fault."""
FIRST_SEED = int(os.environ.get("AFMRL_FIRST_SEED", "0"))
"""First seed of the moments, for trials that are added to those of earlier pytest sessions."""
OUTCOMES = ROOT / "runs" / "bench" / "faults.jsonl"


@dataclass(frozen=True)
class Undisturbed:
    """Results, seconds and folder of a run without faults."""

    folder: Path
    results: dict[str, Any]
    seconds: float


@pytest.fixture(scope="session")
def staging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("staging")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, staging: Path) -> Undisturbed:
    job = Job(tmp_path_factory.mktemp("undisturbed") / "run", staging)
    began = time.monotonic()
    job.start()
    assert job.wait() == 0, job.log_tail()
    seconds = time.monotonic() - began
    job.check_nothing_is_left()
    return Undisturbed(job.folder, job.results(), seconds)


@pytest.fixture(scope="session")
def undisturbed_seconds(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed, staging: Path
) -> Callable[[Iterable[str]], float]:
    """Seconds of a run without faults that runs the given stages again and copies the others."""

    @functools.cache
    def seconds(again: tuple[str, ...]) -> float:
        job = Job(tmp_path_factory.mktemp("undisturbed") / "run", staging)
        job.copy_stages(undisturbed.folder, again)
        began = time.monotonic()
        job.start()
        assert job.wait() == 0, job.log_tail()
        return time.monotonic() - began

    return lambda again: seconds(tuple(again))


@pytest.fixture(autouse=True)
def kill_jobs_after_the_test() -> Iterator[None]:
    yield
    while started_jobs:
        started_jobs.pop().kill_all()


@pytest.fixture
def record_outcome() -> Callable[[Outcome], None]:
    """Save an outcome for the summary table, which every session prints for all outcomes so far."""

    def save(outcome: Outcome) -> None:
        OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
        with OUTCOMES.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")

    return save


class Trials(Protocol):
    """Runs with up to `TRIALS_PER_RUN` faults each, until `TRIALS` faults were injected.

    Each run must end with the results of the undisturbed run, without running committed stages again, and without
    leaving a process behind. Outcomes are recorded.

    Args:
        fault: its name in the summary table.
        again: stages that run while faults are injected; the others are copied from the undisturbed run.
        disturb: starts a job, injects faults and waits for the end; called with the job, a seed and a number of faults.
        options: of `Job`.
    """

    def __call__(
        self, fault: str, again: Iterable[str], disturb: Callable[[Job, int, int], InjectionResult], **options: Any
    ) -> None: ...


@pytest.fixture
def trials(
    undisturbed: Undisturbed,
    undisturbed_seconds: Callable[[Iterable[str]], float],
    staging: Path,
    tmp_path: Path,
    record_outcome: Callable[[Outcome], None],
) -> Trials:
    def until_enough(
        fault: str, again: Iterable[str], disturb: Callable[[Job, int, int], InjectionResult], **options: Any
    ) -> None:
        expected_s = undisturbed_seconds(again)
        injected, seed = 0, FIRST_SEED
        while injected < TRIALS:
            job = Job(tmp_path / f"run{seed}", staging, **options)
            job.copy_stages(undisturbed.folder, again)
            began = time.monotonic()
            result = disturb(job, seed, min(TRIALS_PER_RUN, TRIALS - injected))
            lost_s = time.monotonic() - began - expected_s
            assert result.times, f"the run ended before any fault was injected: {fault}"
            job.check_nothing_is_left()
            job.check_stages_unchanged(result.before)
            assert job.results() == undisturbed.results
            record_outcome(Outcome(fault, seed, result.times, result.resumes, lost_s / result.times))
            injected += result.times
            seed += 1

    return until_enough


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not OUTCOMES.exists():
        return
    lines = map(json.loads, OUTCOMES.read_text().splitlines())
    outcomes = {(line["fault"], line["seed"]): Outcome(**line) for line in lines}
    terminalreporter.section("faults")
    terminalreporter.write_line(
        f"{'fault':<26} {'trials':>6} {'runs':>5} {'resumed':>8} {'lost s, median':>15} {'max':>6}"
    )
    for fault in sorted({fault for fault, _ in outcomes}):
        here = [outcome for outcome in outcomes.values() if outcome.fault == fault]
        lost = [outcome.lost_s for outcome in here]
        terminalreporter.write_line(
            f"{fault:<26} {sum(outcome.trials for outcome in here):>6} {len(here):>5} "
            f"{sum(outcome.resumes for outcome in here):>8} {statistics.median(lost):>15.1f} {max(lost):>6.1f}"
        )
