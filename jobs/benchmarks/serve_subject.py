"""A run that is served, its items as requests, the application, and the same encoder in a loop of this process."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
from ray import serve

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.runs import RunDirectory
from afmrl_ray.serving import app_builder
from afmrl_ray.serving.bundle import Bundle, open_bundle
from afmrl_ray.serving.models import EncoderInput, ServedEncoder
from afmrl_ray.serving.uploads import Upload

NAME = "bench"
BULK = 32
"""Items per request of the bulk requests."""
BATCH_TOKENS = 1024
"""About 16 items: on a CPU, longer batches give no more throughput, and all callers of a batch wait for its end."""
DEPLOYMENTS = ("Encoder", "Index", "Generator", "Ingress")
CPUS = {name.lower(): {"cpus": 0.75} for name in DEPLOYMENTS}


@dataclass(frozen=True)
class Subject:
    """A run that is served, and the items of the requests."""

    run: RunDirectory
    bundle: Bundle
    uploads: list[Upload]

    @classmethod
    def of(cls, run: RunDirectory, catalogue: StagedCatalogue, count: int = 64) -> Subject:
        """A run with `count` random items of its catalogue."""
        rows = np.random.default_rng(0).permutation(len(catalogue))[:count].tolist()
        uploads = [Upload(catalogue.title(row), catalogue.image_bytes(row)) for row in rows]
        return cls(run, open_bundle(run), uploads)

    def bodies(self) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        """Path and request bodies by kind of request."""
        items = [
            {
                "title": upload.title,
                "image": base64.b64encode(upload.image or b"").decode(),
                "attributes_source": "none",
            }
            for upload in self.uploads
        ]
        bulk = [items[start : start + BULK] for start in range(0, len(items), BULK)]
        search = [{**item, "k": 10} for item in items]
        # A running number in the title, so that no attributes come from a cache.
        generated = [{**item, "title": f"{item['title']} @TURN@", "attributes_source": "generated"} for item in search]
        return {
            "embeddings": ("/v1/embeddings", [{"model": "afmrl", "input": [one]} for one in items]),
            f"embeddings, {BULK} per request": ("/v1/embeddings", [{"model": "afmrl", "input": many} for many in bulk]),
            "search": ("/v1/search", search),
            "search, attributes generated": ("/v1/search", generated),
        }


class EncoderLoop:
    """The served encoder in a plain loop of this process."""

    def __init__(self, subject: Subject) -> None:
        self._bundle = subject.bundle
        self._inputs = [EncoderInput(upload) for upload in subject.uploads]
        self._encoder = ServedEncoder(rounds_kept=2, tokens=8192)
        self._encoder.load(self._bundle)

    def embed(self, inputs: Sequence[EncoderInput]) -> np.ndarray:
        """[B, D] embeddings of one batch."""
        return self._encoder.embed(self._bundle, [self._encoder.prepare(self._bundle, one) for one in inputs])

    def embed_all(self) -> np.ndarray:
        """[N, D] embeddings of the subject's items."""
        return self.embed(self._inputs)

    def rate(self, batch: int, seconds: float) -> float:
        """Items per second with batches of `batch` items."""
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            start = count % len(self._inputs)
            count += len(self.embed(self._inputs[start : start + batch]))
        return count / (time.perf_counter() - began)


class Served:
    """A context in which the application serves a subject at `address`."""

    def __init__(self, subject: Subject, port: int, folder: Path, **settings: Any) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.config = ServingConfig.model_validate(
            {
                "run": subject.run.path,
                "state_dir": str(folder / "state"),
                "auth": {"anonymous_on_loopback": True},
                "batching": {"tokens": BATCH_TOKENS},
                **CPUS,
                **settings,
            }
        )

    def __enter__(self) -> Served:
        serve.run(app_builder(self.config), name=NAME)
        return self

    def __exit__(self, *_: object) -> None:
        serve.delete(NAME)

    def post(self, path: str, body: Any) -> requests.Response:
        """Send one request."""
        return requests.post(self.address + path, json=body, timeout=120)

    def embedding(self, body: Any) -> np.ndarray:
        """[B, D] embeddings of a request body."""
        response = self.post("/v1/embeddings", body)
        response.raise_for_status()
        return np.asarray([each["embedding"] for each in response.json()["data"]], dtype=np.float32)

    def has(self, item: str) -> bool:
        """Whether the index has an item."""
        return requests.get(f"{self.address}/v1/items/{item}", timeout=120).status_code == 200

    def pid(self, deployment: str) -> int:
        """Process ID of a replica."""
        return serve.get_deployment_handle(deployment, NAME).pid.remote().result(timeout_s=30)

    def pids(self) -> dict[str, int]:
        """Process IDs by deployment."""
        return {deployment: self.pid(deployment) for deployment in DEPLOYMENTS}

    def memory_mb(self) -> dict[str, float]:
        """Resident memory by deployment, MiB."""
        return {name: psutil.Process(pid).memory_info().rss / 2**20 for name, pid in self.pids().items()}
