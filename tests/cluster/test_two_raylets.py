"""The jobs on a cluster of two raylets with resources and labels of their own, token authentication and an S3 store."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from afmrl_ray.config import dump_yaml, validate
from tests.cit.conftest import run_values
from tests.cluster.raylets import Cluster, leftovers
from tests.cluster.s3 import create_bucket, s3_client, s3_environment
from tests.jobs.test_jobs import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

BUCKET = "afmrl-runs"
_PATIENCE_S = 900


@pytest.fixture(scope="module")
def s3() -> Iterator[int]:
    """Port of a local S3 server with an empty bucket."""
    (port,) = free_ports(1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    create_bucket(port, BUCKET)
    yield port
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), s3_environment(s3))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


def config_of(folder: Path) -> Path:
    values = run_values(folder, run={"name": "s3", "storage_path": f"s3://{BUCKET}/runs"})
    values["agcl"]["workers"]["placement"] = {"labels": {"afmrl/role": "train"}, "resources": {"train_slot": 1}}
    values["rar"]["reward"]["pool"]["placement"] = {
        "strategy": "pack",
        "labels": {"afmrl/role": "reward"},
        "resources": {"reward_slot": 1},
    }
    path = folder / "config.yaml"
    path.write_text(dump_yaml(validate(values)))
    return path


def committed(s3: int) -> dict[str, str]:
    """Stages that are committed, with the digest of their record."""
    found = s3_client(s3).list_objects_v2(Bucket=BUCKET, Prefix="runs/s3/stages/").get("Contents", [])
    return {
        each["Key"].split("/")[3]: each["ETag"]
        for each in found
        if each["Key"].endswith("/stage.json") and "partial" not in each["Key"]
    }


def test_without_the_token_nothing_is_told_and_nothing_starts(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=60)
    assert refused.value.code == 401
    stranger = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
    output = cluster.ray("job", "list", "--address", cluster.address, environment=stranger)
    assert output.returncode != 0
    assert "token authentication is enabled" in output.stderr
    assert cluster.ray("job", "list", "--address", cluster.address).returncode == 0


def test_a_run_is_stopped_and_goes_on_by_the_same_submission(cluster: Cluster, s3: int, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    begun = cluster.submit("first", config, "--no-wait")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    deadline = time.monotonic() + _PATIENCE_S
    while not any(name.startswith("attributes") for name in committed(s3)):
        output = cluster.ray("job", "status", "--address", cluster.address, "first")
        assert "FAILED" not in output.stdout + output.stderr, cluster.ray(
            "job", "logs", "--address", cluster.address, "first"
        ).stdout[-3000:]
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(5)
    assert cluster.ray("job", "stop", "--address", cluster.address, "first").returncode == 0
    before = committed(s3)
    assert "evaluate-r0" not in before

    done = cluster.submit("second", config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    after = committed(s3)
    assert "evaluate-r0" in after
    assert {name: after[name] for name in before} == before
    followed = cluster.ray("job", "logs", "--address", cluster.address, "second")
    assert "agcl-r0" in followed.stdout

    roles = {node["node_id"]: node["labels"]["afmrl/role"] for node in cluster.listed("nodes")}
    actors = cluster.listed("actors")
    rewards = [actor for actor in actors if actor["class_name"].endswith("RewardActor")]
    assert rewards
    assert {roles[actor["node_id"]] for actor in rewards} == {"reward"}
    deadline = time.monotonic() + 60
    while left := leftovers(cluster):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(5)
