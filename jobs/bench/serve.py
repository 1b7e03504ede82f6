"""What serving costs and survives, on a local Ray: throughput and latency by concurrency, overload, kills, fuzzing.

Every answer is compared with the same model in this process first. The limit that throughput is held against is a bare
loop over that model, on as many torch threads as the encoder's replica has, batched as well as it goes.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil
import ray
import requests
import serve_fuzz
import serve_wrk
import torch
from ray import serve
from serve_run import make_run

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.runs import RunDirectory
from afmrl_ray.serving import app_builder
from afmrl_ray.serving.bundle import Bundle, open_bundle
from afmrl_ray.serving.models import EncoderInput, ServedEncoder
from afmrl_ray.serving.uploads import Upload

NAME = "bench"
SIZES = {"small": (128, 4), "large": (512, 8)}
CONCURRENCY = (1, 4, 16, 64)
BULK = 32
BATCH_TOKENS = 1024
"""About 16 items: a CPU gains nothing from more, and while a long batch runs its callers all wait at once."""
PARTS = ("load", "saturation", "overload", "kills", "fuzz")
DEPLOYMENTS = ("Encoder", "Index", "Generator", "Ingress")
CPUS = {name.lower(): {"cpus": 0.75} for name in DEPLOYMENTS}
_CLOSE = 1e-4


@dataclass(frozen=True)
class Subject:
    """A run that is served, and items that are asked about."""

    run: RunDirectory
    bundle: Bundle
    uploads: list[Upload]

    @classmethod
    def of(cls, run: RunDirectory, catalogue: StagedCatalogue, count: int = 64) -> Subject:
        rows = np.random.default_rng(0).permutation(len(catalogue))[:count].tolist()
        uploads = [Upload(catalogue.title(row), catalogue.image_bytes(row)) for row in rows]
        return cls(run, open_bundle(run), uploads)

    def bodies(self) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        """Path and bodies of each kind of request."""
        items = [
            {
                "title": upload.title,
                "image": base64.b64encode(upload.image or b"").decode(),
                "attributes_source": "none",
            }
            for upload in self.uploads
        ]
        bulk = [items[place : place + BULK] for place in range(0, len(items), BULK)]
        found = [{**item, "k": 10} for item in items]
        anew = [{**item, "title": f"{item['title']} @TURN@", "attributes_source": "generated"} for item in found]
        return {
            "embeddings": ("/v1/embeddings", [{"model": "afmrl", "input": [one]} for one in items]),
            f"embeddings, {BULK} a request": ("/v1/embeddings", [{"model": "afmrl", "input": many} for many in bulk]),
            "search": ("/v1/search", found),
            "search, attributes written": ("/v1/search", anew),
        }


class Loop:
    """The bare loop."""

    def __init__(self, subject: Subject) -> None:
        self._bundle = subject.bundle
        self._inputs = [EncoderInput(upload) for upload in subject.uploads]
        self._encoder = ServedEncoder(rounds_kept=2, tokens=8192)
        self._encoder.load(self._bundle)

    def embed(self, inputs: Sequence[EncoderInput]) -> np.ndarray:
        return self._encoder.embed(self._bundle, [self._encoder.prepare(self._bundle, one) for one in inputs])

    def vectors(self) -> np.ndarray:
        return self.embed(self._inputs)

    def rate(self, batch: int, seconds: float) -> float:
        """Items a second."""
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            start = count % len(self._inputs)
            count += len(self.embed(self._inputs[start : start + batch]))
        return count / (time.perf_counter() - began)


class Served:
    """The application of a subject, while it is there."""

    def __init__(self, subject: Subject, port: int, folder: Path, **settings: Any) -> None:
        self.address = f"http://127.0.0.1:{port}"
        auth = {"anonymous_on_loopback": True}
        self.config = ServingConfig.model_validate(
            {
                "run": subject.run.path,
                "state_dir": str(folder / "state"),
                "auth": auth,
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
        return requests.post(self.address + path, json=body, timeout=120)

    def embedding(self, body: Any) -> np.ndarray:
        answer = self.post("/v1/embeddings", body)
        answer.raise_for_status()
        return np.asarray([each["embedding"] for each in answer.json()["data"]], dtype=np.float32)

    def has(self, item: str) -> bool:
        return requests.get(f"{self.address}/v1/items/{item}", timeout=120).status_code == 200

    def pid(self, deployment: str) -> int:
        return serve.get_deployment_handle(deployment, NAME).pid.remote().result(timeout_s=30)

    def pids(self) -> dict[str, int]:
        return {deployment: self.pid(deployment) for deployment in DEPLOYMENTS}

    def memory_mb(self) -> dict[str, float]:
        return {name: psutil.Process(pid).memory_info().rss / 2**20 for name, pid in self.pids().items()}


def check_equal(served: Served, subject: Subject, due: np.ndarray) -> float:
    """Largest difference between served embeddings and the loop's.

    Raises:
        SystemExit: it is too large.
    """
    _, bodies = subject.bodies()["embeddings"]
    worst = max(
        float(np.abs(served.embedding(body)[0] - wanted).max()) for body, wanted in zip(bodies, due, strict=True)
    )
    if worst > _CLOSE:
        raise SystemExit(f"served embeddings differ from the loop's by {worst:.2g}: nothing was measured")
    return worst


def by_concurrency(served: Served, subject: Subject, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """A window of load for each kind of request and each concurrency."""
    rows = []
    for kind, (path, bodies) in subject.bodies().items():
        # A window must hold many answers: what takes long is not asked for 64 times at once.
        for concurrency in CONCURRENCY if kind in ("embeddings", "search") else CONCURRENCY[:-1]:
            shown = [json.dumps(body) for body in bodies]
            found = serve_wrk.load(served.address + path, shown, concurrency, seconds, folder)
            rows.append({"kind": kind, **asdict(found)})
            print(
                f"    {kind:<30} {concurrency:>3} {found.rate:>8.1f}/s  p50 {found.p50:>7.1f}  p95 {found.p95:>7.1f}  "
                f"p99 {found.p99:>7.1f} ms  refused {found.refused}  broken {found.broken}",
                flush=True,
            )
    return rows


def saturation(
    size: str, served: Served, subject: Subject, loop: Loop, seconds: float, folder: Path, worst: float
) -> list[harness.Comparison]:
    """Loop and server in turn."""
    batch = max((1, 8, 32), key=lambda size: loop.rate(size, seconds / 2))
    found = []
    for kind, many in (("embeddings", 1), (f"embeddings, {BULK} a request", BULK)):
        path, bodies = subject.bodies()[kind]
        shown, samples = [json.dumps(body) for body in bodies], []
        for _ in range(5):
            bare = loop.rate(batch, seconds)
            # What is under way when a window ends is not counted, so there is little of it and the window is long.
            answered = serve_wrk.load(served.address + path, shown, max(3, 16 // many), 3 * seconds, folder)
            rate = many * answered.rate
            samples.append((1 / rate, 1 / bare))
        found.append(
            harness.comparison(
                f"{size} model: {kind}, seconds an item",
                f"a bare loop in batches of {batch}",
                samples,
                target=0.85,
                at_most=False,
                equality=f"largest difference of an embedding {worst:.1g}",
            )
        )
    return found


def open_loop(served: Served, subject: Subject, due: np.ndarray, rate: float, seconds: float) -> subprocess.Popen[str]:
    """Start load at a fixed rate."""
    _, bodies = subject.bodies()["embeddings"]
    order = {
        "address": served.address + "/v1/embeddings",
        "rate": rate,
        "seconds": seconds,
        "requests": [{"body": body, "wanted": row.tolist()} for body, row in zip(bodies, due, strict=True)],
    }
    script = str(Path(__file__).with_name("serve_open_loop.py"))
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(order))
    process.stdin.close()
    process.stdin = None
    return process


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=600)
    found = json.loads(out)
    times = found.pop("accepted_ms")
    if times:
        found["accepted_ms"] = {f"p{share}": round(float(np.percentile(times, share)), 1) for share in (50, 95, 99)}
    return found


def overload(served: Served, subject: Subject, due: np.ndarray, capacity: float, seconds: float) -> dict[str, Any]:
    """Four times what it can do: accepted answers are right and not late, the rest is refused, nothing dies."""
    before = served.pids()
    found = told(open_loop(served, subject, due, 4 * capacity, seconds))
    return {"capacity": capacity, **found, "replicas_lived": served.pids() == before}


def kills(served: Served, subject: Subject, due: np.ndarray, capacity: float) -> list[dict[str, Any]]:
    """Kill -9 a replica of each deployment under load at half its capacity, with items being put in meanwhile."""
    rows = []
    for deployment in DEPLOYMENTS:
        load = open_loop(served, subject, due, capacity / 2, 25)
        time.sleep(3)
        with Upserts(served, subject) as upserts:
            time.sleep(2)
            pid = served.pid(deployment)
            os.kill(pid, signal.SIGKILL)
            began = time.perf_counter()
            while not _other(served, deployment, pid):
                time.sleep(0.2)
            recovered = time.perf_counter() - began
            time.sleep(2)
        found = told(load)
        lost = [
            item for item in upserts.accepted if requests.get(f"{served.address}/v1/items/{item}").status_code != 200
        ]
        row = {"killed": deployment, "recovery_s": round(recovered, 1), "upserts": len(upserts.accepted)}
        rows.append({**row, "upserts_lost": len(lost), **found})
        print(f"    {rows[-1]}", flush=True)
    return rows


def _other(served: Served, deployment: str, pid: int) -> bool:
    try:
        return served.pid(deployment) != pid
    except Exception:  # noqa: BLE001 - whatever a handle raises while its replica is away
        return False


class Upserts:
    """Puts items in, one after the other, until it is left; `accepted` are those that were answered 200."""

    def __init__(self, served: Served, subject: Subject) -> None:
        self._served, self._subject = served, subject
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.accepted: list[str] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            item = f"put-{time.monotonic_ns()}"
            body = {"item_id": item, "title": self._subject.uploads[0].title, "attributes": {"color": "red"}}
            try:
                if self._served.post("/v1/items", body).status_code == 200:
                    self.accepted.append(item)
            except requests.RequestException:
                time.sleep(0.1)

    def __enter__(self) -> Upserts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def fuzz(served: Served, count: int) -> dict[str, Any]:
    """Hostile requests against the whole application: nothing but 503 above 499, nothing restarted, memory flat."""
    serve_fuzz.fire(served.address, count // 10)
    before, lived = served.memory_mb(), served.pids()
    found = serve_fuzz.fire(served.address, count)
    after = served.memory_mb()
    grown = {name: round(after[name] - before[name], 1) for name in before}
    return {**found, "replicas_lived": served.pids() == lived, "grown_mb": grown, "memory_mb": after}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of both models")
    parser.add_argument("--seconds", type=float, default=8, help="length of a window of load")
    parser.add_argument("--fuzz", type=int, default=10_000, help="hostile requests")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured")
    options = parser.parse_args()
    if not serve_wrk.available():
        raise ConfigError("wrk is not on the PATH (Debian: apt-get install wrk)")
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=4, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    found: dict[str, Any] = {}
    comparisons: list[harness.Comparison] = []
    for size in options.sizes:
        run, catalogue = make_run(harness.FOLDER / "serve", size, *SIZES[size])
        subject = Subject.of(run, catalogue)
        loop = Loop(subject)
        due = loop.vectors()
        found[size] = measured(size, subject, loop, due, port, options, comparisons)
        harness.show(comparisons)
        harness.write("serve", comparisons, ["torch", "transformers", "ray"])
        (harness.FOLDER / "serve-load.json").write_text(json.dumps(found, indent=2) + "\n")
    serve.shutdown()
    ray.shutdown()
    print(f"-> {harness.FOLDER / 'serve.json'}, {harness.FOLDER / 'serve-load.json'}")
    return 0


def measured(
    size: str,
    subject: Subject,
    loop: Loop,
    due: np.ndarray,
    port: int,
    options: argparse.Namespace,
    comparisons: list[harness.Comparison],
) -> dict[str, Any]:
    """Every part on one size of model."""
    found: dict[str, Any] = {}
    parts = options.parts
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def part(name: str, work: Callable[[], Any]) -> None:
            print(f"  {size}: {name}", flush=True)
            found[name] = work()
            if not isinstance(found[name], list):
                print(f"    {found[name]}", flush=True)

        with Served(subject, port, folder) as served:
            worst = check_equal(served, subject, due)
            path, bodies = subject.bodies()["embeddings"]
            shown = [json.dumps(body) for body in bodies]
            rates = [serve_wrk.load(served.address + path, shown, 64, 3, folder).rate for _ in range(3)]
            capacity = statistics.median(rates)
            if "load" in parts:
                part("batched", lambda: by_concurrency(served, subject, options.seconds, folder))
            if "saturation" in parts:
                comparisons += saturation(size, served, subject, loop, options.seconds, folder, worst)
            if "overload" in parts:
                part("overload", lambda: overload(served, subject, due, capacity, 20))
            if "kills" in parts and size == options.sizes[0]:
                part("kills", lambda: kills(served, subject, due, capacity))
            if "fuzz" in parts and size == options.sizes[0]:
                part("fuzz", lambda: fuzz(served, options.fuzz))
        if "load" in parts:
            with Served(subject, port, folder, batching={"tokens": 1}) as served:
                check_equal(served, subject, due)
                part("one by one", lambda: by_concurrency(served, subject, options.seconds, folder))
    return found


if __name__ == "__main__":
    sys.exit(main())
