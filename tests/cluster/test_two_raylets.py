"""The jobs on a cluster of two raylets with resources and labels of their own, token authentication and an S3 store."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from afmrl_ray.config import dump_yaml, validate
from tests.cit.conftest import run_values
from tests.jobs.test_jobs import ROOT, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

RAY = str(Path(sys.executable).parent / "ray")
BUCKET = "afmrl-runs"
_PATIENCE_S = 900


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """Environment with which anything finds a local S3 server."""
    from moto.server import ThreadedMotoServer

    (port,) = free_ports(1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    store(environment).create_bucket(Bucket=BUCKET)
    yield environment
    server.stop()


def store(environment: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )


class Cluster:
    """A head and a worker; `environment` is that of a client with the token."""

    def __init__(self, folder: Path, more: dict[str, str]) -> None:
        port, self.dashboard, *agents = free_ports(6)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "RAY_AUTH"))}
        self.environment = {**kept, **more, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.address = f"http://127.0.0.1:{self.dashboard}"
        common = ["--num-cpus=2", "--object-store-memory=100000000", "--block"]
        self._temporary = f"/tmp/tr{os.getpid()}"
        head = [
            f"--port={port}", "--head", "--node-ip-address=127.0.0.1", "--include-dashboard=true",
            f"--dashboard-port={self.dashboard}", f"--temp-dir={self._temporary}", "--labels=afmrl/role=train",
            '--resources={"train_slot": 4}',
        ]  # fmt: skip
        worker = [
            f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1", "--labels=afmrl/role=reward",
            '--resources={"reward_slot": 1}',
        ]  # fmt: skip
        self.raylets = []
        for options, (agent, metrics) in zip((head, worker), (agents[:2], agents[2:]), strict=True):
            ports = [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
            self.raylets.append(self._start([*options, *ports, *common]))
            self._wait_for(len(self.raylets))

    def _start(self, options: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [RAY, "start", *options], env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def _wait_for(self, nodes: int) -> None:
        deadline = time.monotonic() + 180
        while len(self.listed("nodes")) < nodes:
            assert time.monotonic() < deadline, f"{nodes} nodes never came up"
            time.sleep(1)

    def ray(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, *words], env=environment or self.environment, capture_output=True, text=True, timeout=900, check=False
        )

    def listed(self, kind: str) -> list[dict[str, Any]]:
        done = self.ray("list", kind, "--address", self.address, "--format", "json", "--detail", "--limit", "1000")
        return json.loads(done.stdout) if done.returncode == 0 and done.stdout.strip() else []

    def submit(self, name: str, config: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return self.ray(
            "job", "submit", "--address", self.address, "--submission-id", name, "--working-dir", str(ROOT), *words,
            "--", sys.executable, "jobs/run_cit.py", "--config", str(config),
        )  # fmt: skip

    def close(self) -> None:
        for raylet in reversed(self.raylets):
            raylet.terminate()
            raylet.wait(60)


@pytest.fixture(scope="module")
def cluster(s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), s3)
    yield cluster
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


def committed(s3: dict[str, str]) -> dict[str, str]:
    """Stages that are committed, with the digest of their record."""
    found = store(s3).list_objects_v2(Bucket=BUCKET, Prefix="runs/s3/stages/").get("Contents", [])
    return {
        each["Key"].split("/")[3]: each["ETag"]
        for each in found
        if each["Key"].endswith("/stage.json") and "partial" not in each["Key"]
    }


def test_without_the_token_nothing_is_told_and_nothing_starts(cluster: Cluster, tmp_path: Path) -> None:
    stranger = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
    refused = cluster.ray("job", "list", "--address", cluster.address, environment=stranger)
    assert refused.returncode != 0
    assert "401" in refused.stdout + refused.stderr or "nauthenticated" in refused.stdout + refused.stderr
    assert cluster.ray("job", "list", "--address", cluster.address).returncode == 0


def test_a_run_is_stopped_and_goes_on_by_the_same_submission(
    cluster: Cluster, s3: dict[str, str], tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    begun = cluster.submit("first", config, "--no-wait")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    deadline = time.monotonic() + _PATIENCE_S
    while not any(name.startswith("attributes") for name in committed(s3)):
        told = cluster.ray("job", "status", "--address", cluster.address, "first").stdout
        assert "FAILED" not in told, cluster.ray("job", "logs", "--address", cluster.address, "first").stdout[-3000:]
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(1)
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
    assert all(actor["state"] == "DEAD" for actor in actors)
    assert all(group["state"] == "REMOVED" for group in cluster.listed("placement-groups"))
