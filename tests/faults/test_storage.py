"""A disk that fills up, and a second driver: the job ends with a line that says what to do, and goes on afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import PATIENCE_S, ROOT, Job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of a few megabytes, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no filesystem can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=False)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, undisturbed: Undisturbed, staging: Path
) -> None:
    job = Job(small_disk / "run", staging)
    job.log = small_disk.parent / "log"
    job.start()
    assert job.wait() in (1, 2)
    assert "No space left on device" in job.log.read_text()
    assert "Traceback" not in job.told()
    job.check_nothing_is_left()
    before = job.commits()
    subprocess.run(["mount", "-o", "remount,size=500m", str(small_disk)], check=True)
    job.start()
    assert job.wait() == 0, job.told()
    after = job.commits()
    assert {name: after[name] for name in before} == before
    assert job.results() == undisturbed.results


def test_a_second_driver_refuses_and_the_first_is_not_disturbed(
    undisturbed: Undisturbed, staging: Path, tmp_path: Path
) -> None:
    job = Job(tmp_path / "run", staging)
    job.start()
    deadline = time.monotonic() + PATIENCE_S
    while not (job.folder / "t" / "driver.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    second = subprocess.run(
        [sys.executable, str(ROOT / "jobs/run_cit.py"), "--config", str(job.config)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert second.returncode == 2
    assert "another driver, process " in second.stderr.strip().splitlines()[-1]
    assert job.wait() == 0, job.told()
    assert job.results() == undisturbed.results
