"""Nodes of a cluster that are lost at random moments: a worker node that comes back, and the head with everything.

`make chaos TRIALS=20`. Two raylets on this machine, with token authentication.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.raylets import Cluster, leftovers
from tests.faults.conftest import Trials
from tests.faults.harness import COMPARED, PATIENCE_S, TITLES, InjectionResult, Job, find_title, finish, kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

QUICK = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""How long processes wait for a lost head, in seconds; Ray's default is 60."""
MOMENTS_S = (5.0, 60.0)
"""From one loss to the next, or from the job's beginning."""


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Callable[[], Cluster]]:
    """Starts a cluster, in place of the last; none outlives the test."""
    started: list[Cluster] = []

    def start() -> Cluster:
        end()
        started.append(Cluster(tmp_path, QUICK))
        started[-1].start()
        return started[-1]

    def end() -> None:
        while started:
            started.pop().close()

    yield start
    end()


def test_a_lost_node_costs_time_and_nothing_else(clusters: Callable[[], Cluster], trials: Trials) -> None:
    cluster = clusters()

    def lose(job: Job, seed: int, times: int) -> InjectionResult:
        dice = random.Random(f"node {seed}")
        before: dict[str, str] = {}
        given = resumes = 0
        job.start()
        while given < times:
            time.sleep(dice.uniform(*MOMENTS_S))
            if not job.lives():
                if job.wait() == 0:
                    break
                resumes += 1
                job.resume()
            before |= job.commits()
            kill(find_title(cluster.processes(1), TITLES["raylet"])[0])
            given += 1
            time.sleep(dice.uniform(0, 5))
            cluster.restart(1)
        return InjectionResult(given, resumes + finish(job), before)

    trials("node", COMPARED, lose, environment=cluster.environment | {"RAY_ADDRESS": cluster.gcs})
    deadline = time.monotonic() + 60
    while left := leftovers(cluster):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(5)


def test_a_lost_head_costs_a_resubmission(clusters: Callable[[], Cluster], trials: Trials) -> None:
    def lose(job: Job, seed: int, times: int) -> InjectionResult:
        dice = random.Random(f"head {seed}")
        before: dict[str, str] = {}
        for number in range(times):
            cluster = clusters()
            begun = cluster.submit(f"number-{number}", job.config, "--no-wait")
            assert begun.returncode == 0, begun.stdout + begun.stderr
            time.sleep(dice.uniform(*MOMENTS_S))
            before |= job.commits()
            drivers = running(job)
            kill(find_title(cluster.processes(0), TITLES["head"])[0])
            _, alive = psutil.wait_procs(drivers, timeout=PATIENCE_S)
            assert not alive, f"drivers outlive their cluster: {alive}"
        done = clusters().submit("last", job.config)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return InjectionResult(times, times, before)

    trials("head, resubmitted", COMPARED, lose)


def running(job: Job) -> list[psutil.Process]:
    """Drivers of a job, whoever started them."""
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if str(job.config) in (process.info["cmdline"] or ())]
