"""The undisturbed run that trials are compared with, and their table at the end."""

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

from tests.faults.harness import A_RUN, ROOT, InjectionResult, Job, Outcome, started

TRIALS = int(os.environ.get("AFMRL_TRIALS", "1"))
"""Of each fault."""
FIRST_SEED = int(os.environ.get("AFMRL_FIRST_SEED", "0"))
"""Of the moments, for trials that are added to those of earlier sessions."""
OUTCOMES = ROOT / "runs" / "bench" / "faults.jsonl"


@dataclass(frozen=True)
class Undisturbed:
    """Results, seconds and folder of a run that nothing was done to."""

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
    assert job.wait() == 0, job.told()
    seconds = time.monotonic() - began
    job.check_nothing_is_left()
    return Undisturbed(job.folder, job.results(), seconds)


@pytest.fixture(scope="session")
def calm(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: Undisturbed, staging: Path
) -> Callable[[Iterable[str]], float]:
    """Seconds of a run that makes these stages again and takes over the others, with nothing done to it."""

    @functools.cache
    def seconds(again: tuple[str, ...]) -> float:
        job = Job(tmp_path_factory.mktemp("calm") / "run", staging)
        job.begin_from(undisturbed.folder, again)
        began = time.monotonic()
        job.start()
        assert job.wait() == 0, job.told()
        return time.monotonic() - began

    return lambda again: seconds(tuple(again))


@pytest.fixture(autouse=True)
def no_job_outlives_its_test() -> Iterator[None]:
    yield
    while started:
        started.pop().end()


@pytest.fixture
def note() -> Callable[[Outcome], None]:
    """Keep a trial for the table, which the end of each session prints of all trials so far."""

    def keep(outcome: Outcome) -> None:
        OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
        with OUTCOMES.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")

    return keep


class Trials(Protocol):
    """Runs with something done to them, up to ten times each, until that was done `TRIALS` times.

    Each must end with the results of the undisturbed run, with what was
    committed untouched and no process left. Outcomes are noted.

    Args:
        fault: its name in the table.
        again: stages that are made amid it; the others are taken over from the undisturbed run.
        disturb: starts a job, waits for its end, and does it, given a seed and how often.
        options: of `Job`.
    """

    def __call__(
        self, fault: str, again: Iterable[str], disturb: Callable[[Job, int, int], InjectionResult], **options: Any
    ) -> None: ...


@pytest.fixture
def trials(
    undisturbed: Undisturbed,
    calm: Callable[[Iterable[str]], float],
    staging: Path,
    tmp_path: Path,
    note: Callable[[Outcome], None],
) -> Trials:
    def until_enough(
        fault: str, again: Iterable[str], disturb: Callable[[Job, int, int], InjectionResult], **options: Any
    ) -> None:
        calm_s = calm(again)
        given, seed = 0, FIRST_SEED
        while given < TRIALS:
            job = Job(tmp_path / f"run{seed}", staging, **options)
            job.begin_from(undisturbed.folder, again)
            began = time.monotonic()
            struck = disturb(job, seed, min(A_RUN, TRIALS - given))
            lost_s = time.monotonic() - began - calm_s
            assert struck.times, f"the run was over before there was a trial: {fault}"
            job.check_nothing_is_left()
            job.check_stages_stand(struck.before)
            assert job.results() == undisturbed.results
            note(Outcome(fault, seed, struck.times, struck.resumes, lost_s / struck.times))
            given += struck.times
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
