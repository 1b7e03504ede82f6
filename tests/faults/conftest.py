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
from typing import Any

import pytest

from tests.faults.harness import ROOT, Job, Outcome, started

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
