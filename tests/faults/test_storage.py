"""Failing storage and modified stages: an error line says what to do, and the run continues afterwards."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from afmrl_ray.errors import StorageError
from afmrl_ray.runs import RunDirectory, StageOutcome
from tests.cluster.s3 import create_bucket, s3_environment
from tests.faults.conftest import TRIALS, Undisturbed
from tests.faults.flaky_s3 import FlakyS3
from tests.faults.harness import ROOT, TIMEOUT_S, Job, Outcome
from tests.jobs.test_jobs import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of three megabytes; the test is skipped where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no filesystem can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=False)


def test_a_full_disk_is_reported_and_the_run_continues_with_more_space(
    small_disk: Path, undisturbed: Undisturbed, staging: Path
) -> None:
    job = Job(small_disk / "run", staging)
    job.log = small_disk.parent / "log"
    job.start()
    assert job.wait() in (1, 2)
    assert "No space left on device" in job.log.read_text()
    # Progress bars of ended workers may follow it.
    assert [line for line in job.log_tail().splitlines() if line.startswith(("error: ", "failed (in stage "))]
    job.check_nothing_is_left()
    before = job.commits()
    subprocess.run(["mount", "-o", "remount,size=500m", str(small_disk)], check=True)
    job.start()
    assert job.wait() == 0, job.log_tail()
    job.check_stages_unchanged(before)
    assert job.results() == undisturbed.results


def test_a_second_driver_exits_with_an_error_and_the_first_continues(
    undisturbed: Undisturbed, staging: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path / "run", staging)
    job.start()
    deadline = time.monotonic() + TIMEOUT_S
    while not (job.folder / "t" / "driver.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    second = subprocess.run(
        [sys.executable, str(ROOT / "jobs/run_cit.py"), "--config", str(job.config)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert second.returncode == 2
    assert "another driver, process " in second.stderr.strip().splitlines()[-1]
    assert job.wait() == 0, job.log_tail()
    assert job.results() == undisturbed.results


def test_results_do_not_depend_on_rejected_writes(
    undisturbed: Undisturbed,
    staging: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_outcome: Callable[[Outcome], None],
) -> None:
    (port,) = free_ports(1)
    server = FlakyS3(port, every=10)
    server.start()
    for name, value in s3_environment(port).items():
        monkeypatch.setenv(name, value)
    create_bucket(port, "flaky")
    job = Job(tmp_path / "run", staging, storage_path="s3://flaky/runs")
    began = time.monotonic()
    job.start()
    assert job.wait() == 0, job.log_tail()
    assert server.failed > 10
    assert job.results() == undisturbed.results
    server.stop()
    lost_s = time.monotonic() - began - undisturbed.seconds
    record_outcome(Outcome("every tenth write fails", 0, server.failed, 0, lost_s / server.failed))


def _must_not_run(directory: str) -> StageOutcome:
    raise AssertionError(f"the stage in {directory} ran again")


@pytest.mark.parametrize("seed", range(TRIALS))
def test_the_error_for_a_modified_file_names_the_stage(
    seed: int, undisturbed: Undisturbed, tmp_path: Path, record_outcome: Callable[[Outcome], None]
) -> None:
    draw = random.Random(seed)
    shutil.copytree(undisturbed.folder / "t", tmp_path / "t")
    stage = draw.choice([stage for stage in RunDirectory(str(tmp_path), "t").stages() if stage.outputs])
    roots = [Path(stage.output(name)) for name in stage.outputs]
    files = sorted(
        file for root in roots for file in [root, *root.rglob("*")] if file.is_file() and file.stat().st_size
    )
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    with pytest.raises(StorageError, match=rf"^stage {stage.name}: .*SHA-256 differs.*put it back from a copy"):
        RunDirectory(str(tmp_path), "t").run_stage(stage.name, stage.inputs, _must_not_run)
    record_outcome(Outcome("flipped bit in a stage", seed, 1, 0, 0.0))


def test_no_stage_runs_again_because_of_wrong_clocks(undisturbed: Undisturbed, staging: Path, tmp_path: Path) -> None:
    """The records and files of half of the stages have timestamps far in the future, the others far in the past."""
    job = Job(tmp_path / "run", staging)
    shutil.copytree(undisturbed.folder / "t", job.folder / "t")
    records = sorted((job.folder / "t" / "stages").glob("*/stage.json"))
    for number, record in enumerate(records):
        year = "2099" if number % 2 else "1999"
        stamped = re.sub(r'"committed_at": "\d{4}', f'"committed_at": "{year}', record.read_text())
        record.write_text(stamped)
        for file in record.parent.rglob("*"):
            os.utime(file, (4e9, 4e9) if number % 2 else (9e8, 9e8))
    before = job.commits()
    job.start()
    assert job.wait() == 0, job.log_tail()
    assert job.commits() == before
    assert "running" not in job.log_tail()
