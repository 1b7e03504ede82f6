"""A cluster of two raylets on this machine, each with resources and labels of its own, that asks for a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.jobs.test_jobs import ROOT, free_ports

RAY = str(Path(sys.executable).parent / "ray")


class Cluster:
    """A head and a worker.

    Args:
        folder: for the token and what nodes tell.
        more: environment of every process, beside the token.

    Attributes:
        environment: of a client that may come in.
        address: of the dashboard, for jobs.
        gcs: host and port that drivers connect to.
    """

    def __init__(self, folder: Path, more: dict[str, str]) -> None:
        port, self.dashboard, *agents = free_ports(6)
        self.gcs = f"127.0.0.1:{port}"
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_ADDRESS", "RAY_AUTH"))}
        self.environment = {**kept, **more, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.address = f"http://127.0.0.1:{self.dashboard}"
        common = ["--num-cpus=2", "--object-store-memory=100000000", "--block"]
        # Two agents in one directory clear away each other's runtime environments. (Short: sockets' paths are limited.)
        self._temporary = [f"/tmp/tr{os.getpid()}{node}" for node in "hw"]
        head = [
            f"--port={port}", "--head", "--node-ip-address=127.0.0.1", "--include-dashboard=true",
            f"--dashboard-port={self.dashboard}", "--labels=afmrl/role=train",
            '--resources={"train_slot": 4}',
        ]  # fmt: skip
        worker = [
            f"--address={self.gcs}", "--node-ip-address=127.0.0.1", "--labels=afmrl/role=reward",
            '--resources={"reward_slot": 1}',
        ]  # fmt: skip
        self._logs = [folder / f"node-{node}.log" for node in range(2)]
        self.raylets: list[subprocess.Popen[bytes]] = []
        self._plans = []
        for options, (agent, metrics), folder in zip(
            (head, worker), (agents[:2], agents[2:]), self._temporary, strict=True
        ):
            own = [
                f"--temp-dir={folder}",
                f"--dashboard-agent-listen-port={agent}",
                f"--metrics-export-port={metrics}",
            ]
            self._plans.append([*options, *own, *common])

    def start(self) -> None:
        for node in range(len(self._plans)):
            self.raylets.append(self._start(node))
            self._wait_for(len(self.raylets))

    def _start(self, node: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [RAY, "start", *self._plans[node]],
            env=self.environment,
            stdout=self._logs[node].open("wb"),
            stderr=subprocess.STDOUT,
        )

    def processes(self, node: int) -> list[psutil.Process]:
        """Of the head (0) or the worker (1), but for the one that started them."""
        return psutil.Process(self.raylets[node].pid).children(recursive=True)

    def restart(self, node: int) -> None:
        """A node whose raylet died comes back under another id."""
        self.raylets[node].wait(60)
        self.raylets[node] = self._start(node)
        self._wait_for(len(self.raylets))

    def _wait_for(self, nodes: int) -> None:
        deadline = time.monotonic() + 400
        while sum(node["state"] == "ALIVE" for node in self.listed("nodes")) < nodes:
            if time.monotonic() > deadline or any(raylet.poll() is not None for raylet in self.raylets):
                output = [log.read_text()[-2000:] for log in self._logs[:nodes]]
                raise AssertionError(f"{nodes} nodes never came up: {output}")
            time.sleep(1)

    def ray(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, *words], env=environment or self.environment, capture_output=True, text=True, timeout=900, check=False
        )

    def listed(self, kind: str) -> list[dict[str, Any]]:
        done = self.ray("list", kind, "--address", self.address, "--format", "json", "--detail", "--limit", "1000")
        return json.loads(done.stdout) if done.stdout.lstrip().startswith("[") else []

    def submit(self, name: str, config: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return self.ray(
            "job", "submit", "--address", self.address, "--submission-id", name, "--working-dir", str(ROOT), *words,
            "--", sys.executable, "jobs/run_cit.py", "--config", str(config),
        )  # fmt: skip

    def close(self) -> None:
        for raylet in reversed(self.raylets):
            raylet.terminate()
            raylet.wait(60)
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)


RAYS_OWN = ("_AutoscalingCoordinatorActor", "_UsageCollectionActor", "_StatsActor", "ActorLocationTracker")
"""Of Ray Data: one for the whole cluster and all its jobs, none of which takes a CPU."""


def leftovers(cluster: Cluster) -> list[str]:
    """Actors and placement groups that still hold something."""
    actors = [actor["class_name"] for actor in cluster.listed("actors") if actor["state"] != "DEAD"]
    actors = [name for name in actors if name not in RAYS_OWN]
    groups = [group["state"] for group in cluster.listed("placement-groups") if group["state"] != "REMOVED"]
    return actors + groups
