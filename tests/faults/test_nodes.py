"""Nodes of a cluster that are lost at random moments: a worker node that comes back, and the head with everything.

`make chaos TRIALS=20`. Two raylets on this machine, with token authentication.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.raylets import Cluster, leftovers
from tests.faults.conftest import TRIALS, Undisturbed
from tests.faults.harness import A_RUN, COMPARED, PATIENCE_S, TITLES, Job, Outcome, find_title, finish, kill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

QUICK = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""How long processes wait for a lost head, in seconds; Ray's default is 60."""
SEEDS = range(math.ceil(TRIALS / A_RUN))


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


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lost_node_costs_time_and_nothing_else(
    seed: int,
    clusters: Callable[[], Cluster],
    undisturbed: Undisturbed,
    calm: Callable[[Iterable[str]], float],
    staging: Path,
    tmp_path: Path,
    note: Callable[[Outcome], None],
) -> None:
    calm_s = calm(COMPARED)
    cluster = clusters()
    job = Job(tmp_path / "run", staging, environment=cluster.environment | {"RAY_ADDRESS": cluster.gcs})
    job.begin_from(undisturbed.folder, COMPARED)
    dice = random.Random(f"node {seed}")
    before: dict[str, str] = {}
    given = resumes = 0
    began = time.monotonic()
    job.start()
    while given < min(A_RUN, TRIALS):
        time.sleep(dice.uniform(5, 60))
        if not job.lives():
            if job.wait() == 0:
                break
            resumes += 1
            job.resume()
        before |= job.commits()
        kill_one(cluster.processes(1), TITLES["raylet"])
        given += 1
        time.sleep(dice.uniform(0, 5))
        cluster.restart(1)
    resumes += finish(job)
    lost_s = time.monotonic() - began - calm_s
    assert given, "the run was over before a node was lost"
    job.check_nothing_is_left()
    after = job.commits()
    assert {name: after[name] for name in before} == before
    assert job.results() == undisturbed.results
    deadline = time.monotonic() + 60
    while left := leftovers(cluster):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(5)
    note(Outcome("node", seed, given, resumes, lost_s / given))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lost_head_costs_a_resubmission(
    seed: int,
    clusters: Callable[[], Cluster],
    undisturbed: Undisturbed,
    calm: Callable[[Iterable[str]], float],
    staging: Path,
    tmp_path: Path,
    note: Callable[[Outcome], None],
) -> None:
    calm_s = calm(COMPARED)
    job = Job(tmp_path / "run", staging)
    job.begin_from(undisturbed.folder, COMPARED)
    dice = random.Random(f"head {seed}")
    before: dict[str, str] = {}
    kills = min(A_RUN, TRIALS)
    began = time.monotonic()
    for number in range(kills):
        cluster = clusters()
        begun = cluster.submit(f"number-{number}", job.config, "--no-wait")
        assert begun.returncode == 0, begun.stdout + begun.stderr
        time.sleep(dice.uniform(5, 60))
        before |= job.commits()
        drivers = running(job)
        kill_one(cluster.processes(0), TITLES["head"])
        _, alive = psutil.wait_procs(drivers, timeout=PATIENCE_S)
        assert not alive, f"drivers outlive their cluster: {alive}"
    done = clusters().submit("last", job.config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    lost_s = time.monotonic() - began - calm_s
    after = job.commits()
    assert {name: after[name] for name in before} == before
    assert job.results() == undisturbed.results
    note(Outcome("head, resubmitted", seed, kills, kills, lost_s / kills))


def running(job: Job) -> list[psutil.Process]:
    """Drivers of a job, whoever started them."""
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if str(job.config) in (process.info["cmdline"] or ())]


def kill_one(processes: Iterable[psutil.Process], title: str) -> None:
    target = find_title(processes, title)
    assert target is not None, f"no process looks like {title}"
    kill(target)
