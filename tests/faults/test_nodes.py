"""Loss of cluster nodes at random moments: of a worker node that returns, and of the head with the whole cluster.

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
from tests.faults.harness import COMPARED, TIMEOUT_S, TITLES, InjectionResult, Job, find_title, finish, kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

RECONNECT_TIMEOUT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""How long processes wait for a lost head, in seconds; Ray's default is 60."""
DELAY_S = (5.0, 60.0)
"""Range of the delay from the start of the job, or from the last loss, to the next loss."""


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Callable[[], Cluster]]:
    """Starts a cluster after closing the one before; the last one is closed after the test."""
    started: list[Cluster] = []

    def start() -> Cluster:
        end()
        started.append(Cluster(tmp_path, RECONNECT_TIMEOUT))
        started[-1].start()
        return started[-1]

    def end() -> None:
        while started:
            started.pop().close()

    yield start
    end()


def test_results_do_not_depend_on_a_lost_worker_node(clusters: Callable[[], Cluster], trials: Trials) -> None:
    cluster = clusters()

    def lose(job: Job, seed: int, times: int) -> InjectionResult:
        draw = random.Random(f"node {seed}")
        before: dict[str, str] = {}
        lost = resumes = 0
        job.start()
        while lost < times:
            time.sleep(draw.uniform(*DELAY_S))
            if not job.is_running():
                if job.wait() == 0:
                    break
                resumes += 1
                job.resume()
            before |= job.commits()
            kill(find_title(cluster.processes(1), TITLES["raylet"])[0])
            lost += 1
            time.sleep(draw.uniform(0, 5))
            cluster.restart(1)
        return InjectionResult(lost, resumes + finish(job), before)

    trials("node", COMPARED, lose, environment=cluster.environment | {"RAY_ADDRESS": cluster.gcs})
    deadline = time.monotonic() + 60
    while left := leftovers(cluster):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(5)


def test_a_resubmitted_job_continues_after_the_head_was_lost(clusters: Callable[[], Cluster], trials: Trials) -> None:
    def lose(job: Job, seed: int, times: int) -> InjectionResult:
        draw = random.Random(f"head {seed}")
        before: dict[str, str] = {}
        for number in range(times):
            cluster = clusters()
            begun = cluster.submit(f"number-{number}", job.config, "--no-wait")
            assert begun.returncode == 0, begun.stdout + begun.stderr
            time.sleep(draw.uniform(*DELAY_S))
            before |= job.commits()
            drivers = driver_processes(job)
            kill(find_title(cluster.processes(0), TITLES["head"])[0])
            _, alive = psutil.wait_procs(drivers, timeout=TIMEOUT_S)
            assert not alive, f"drivers outlive their cluster: {alive}"
        done = clusters().submit("last", job.config)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return InjectionResult(times, times, before)

    trials("head, resubmitted", COMPARED, lose)


def driver_processes(job: Job) -> list[psutil.Process]:
    """Driver processes of a job."""
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if str(job.config) in (process.info["cmdline"] or ())]
