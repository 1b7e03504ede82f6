"""Measurements of a served application: throughput and latency, overload, killed replicas, hostile requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import requests
from tqdm import tqdm

from jobs.benchmarks import harness, serve_fuzz, serve_wrk
from jobs.benchmarks.serve_subject import BULK, DEPLOYMENTS, EncoderLoop, Served, Subject

CONCURRENCY = (1, 4, 16, 64)
_CLOSE = 1e-4


def check_equal(served: Served, subject: Subject, expected: np.ndarray) -> float:
    """Largest absolute difference between served embeddings and those of the loop.

    Raises:
        SystemExit: it is above the limit.
    """
    _, bodies = subject.bodies()["embeddings"]
    worst = max(
        float(np.abs(served.embedding(body)[0] - wanted).max()) for body, wanted in zip(bodies, expected, strict=True)
    )
    if worst > _CLOSE:
        raise SystemExit(f"served embeddings differ from the loop's by {worst:.2g}: nothing was measured")
    return worst


def by_concurrency(served: Served, subject: Subject, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Throughput and latency for each kind of request and each concurrency."""
    windows = [
        (kind, path, bodies, concurrency)
        for kind, (path, bodies) in subject.bodies().items()
        # A window must contain many responses, so slow requests are not sent with the highest concurrency.
        for concurrency in (CONCURRENCY if kind in ("embeddings", "search") else CONCURRENCY[:-1])
    ]
    rows = []
    for kind, path, bodies, concurrency in tqdm(windows, desc="load"):
        encoded = [json.dumps(body) for body in bodies]
        found = serve_wrk.load(served.address + path, encoded, concurrency, seconds, folder)
        rows.append({"kind": kind, **asdict(found)})
    return rows


def saturation(
    size: str, served: Served, subject: Subject, loop: EncoderLoop, seconds: float, folder: Path, worst: float
) -> list[harness.Comparison]:
    """Seconds per item of the saturated server against the loop, timed in turn.

    Args:
        size: name of the model size.
        seconds: length of a window of the loop.
        worst: result of `check_equal`.
    """
    batch = max((1, 8, 32), key=lambda size: loop.rate(size, seconds / 2))
    found = []
    for kind, many in (("embeddings", 1), (f"embeddings, {BULK} per request", BULK)):
        path, bodies = subject.bodies()[kind]
        encoded, samples = [json.dumps(body) for body in bodies], []
        for _ in range(5):
            bare = loop.rate(batch, seconds)
            # Unfinished requests at the end of a window are not counted, so concurrency is low and the window long.
            answered = serve_wrk.load(served.address + path, encoded, max(3, 16 // many), 3 * seconds, folder)
            rate = many * answered.rate
            samples.append((1 / rate, 1 / bare))
        found.append(
            harness.comparison(
                f"{size} model: {kind}, seconds per item",
                f"a loop with batches of {batch}",
                samples,
                target=0.85,
                at_most=False,
                equality=f"largest difference of an embedding {worst:.1g}",
            )
        )
    return found


def open_loop(
    served: Served, subject: Subject, expected: np.ndarray, rate: float, seconds: float
) -> subprocess.Popen[str]:
    """Start load at `rate` requests per second."""
    _, bodies = subject.bodies()["embeddings"]
    order = {
        "address": served.address + "/v1/embeddings",
        "rate": rate,
        "seconds": seconds,
        "requests": [{"body": body, "wanted": row.tolist()} for body, row in zip(bodies, expected, strict=True)],
    }
    command = [sys.executable, "-m", "jobs.benchmarks.serve_open_loop"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(order))
    process.stdin.close()
    process.stdin = None
    return process


def load_result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Result of finished load, with percentiles of the accepted requests' latency."""
    out, _ = process.communicate(timeout=600)
    found = json.loads(out)
    times = found.pop("accepted_ms")
    if times:
        found["accepted_ms"] = {f"p{q}": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)}
    return found


def overload(served: Served, subject: Subject, expected: np.ndarray, capacity: float, seconds: float) -> dict[str, Any]:
    """Load of four times the capacity: responses by status, latency of the accepted ones, and whether replicas live."""
    before = served.pids()
    found = load_result(open_loop(served, subject, expected, 4 * capacity, seconds))
    return {"capacity": capacity, **found, "replicas_lived": served.pids() == before}


def kills(served: Served, subject: Subject, expected: np.ndarray, capacity: float) -> list[dict[str, Any]]:
    """Kill a replica of each deployment with SIGKILL, under load of half the capacity and with upserts."""
    rows = []
    for deployment in DEPLOYMENTS:
        load = open_loop(served, subject, expected, capacity / 2, 25)
        time.sleep(3)
        with Upserts(served, subject) as upserts:
            time.sleep(2)
            pid = served.pid(deployment)
            os.kill(pid, signal.SIGKILL)
            began = time.perf_counter()
            while not _replaced(served, deployment, pid):
                time.sleep(0.2)
            recovered = time.perf_counter() - began
            time.sleep(2)
        found = load_result(load)
        lost = [item for item in upserts.accepted if not served.has(item)]
        row = {"killed": deployment, "recovery_s": round(recovered, 1), "upserts": len(upserts.accepted)}
        rows.append({**row, "upserts_lost": len(lost), **found})
        print(f"    {rows[-1]}", flush=True)
    return rows


def _replaced(served: Served, deployment: str, pid: int) -> bool:
    try:
        return served.pid(deployment) != pid
    except Exception:  # noqa: BLE001 - whatever a handle raises while its replica is down
        return False


class Upserts:
    """A context in which items are upserted one after the other; `accepted` are the IDs that were answered with 200."""

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
    """Hostile requests: the only expected status above 499 is 503, replicas live, memory does not grow."""
    serve_fuzz.fire(served.address, count // 10)
    before, lived = served.memory_mb(), served.pids()
    found = serve_fuzz.fire(served.address, count)
    after = served.memory_mb()
    grown = {name: round(after[name] - before[name], 1) for name in before}
    return {**found, "replicas_lived": served.pids() == lived, "grown_mb": grown, "memory_mb": after}
