"""Cost and robustness of serving on a local Ray: throughput and latency by concurrency, overload, kills, fuzzing.

Every response is compared with the same model in this process first. Throughput is compared with a plain loop over that
model, with as many torch threads as the encoder's replica has and with the best of several batch sizes.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from afmrl_ray.errors import ConfigError
from afmrl_ray.report.text_table import TextTable, print_tables
from jobs.benchmarks import harness, serve_wrk
from jobs.benchmarks.serve_measures import by_concurrency, check_equal, fuzz, kills, overload, saturation
from jobs.benchmarks.serve_run import make_run
from jobs.benchmarks.serve_subject import EncoderLoop, Served, Subject

SIZES = {"small": (128, 4), "large": (512, 8)}
"""Hidden size and layers."""
PARTS = ("load", "saturation", "overload", "kills", "fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="sizes of both models")
    parser.add_argument("--seconds", type=float, default=8, help="length of a window of load")
    parser.add_argument("--fuzz", type=int, default=10_000, help="number of hostile requests")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measurements")
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
        loop = EncoderLoop(subject)
        found[size] = measure(size, subject, loop, loop.embed_all(), port, options, comparisons)
        harness.show(comparisons)
        harness.write("serve", comparisons, ["torch", "transformers", "ray"])
        (harness.FOLDER / "serve-load.json").write_text(json.dumps(found, indent=2) + "\n")
    serve.shutdown()
    ray.shutdown()
    print(f"-> {harness.FOLDER / 'serve.json'}, {harness.FOLDER / 'serve-load.json'}")
    return 0


def measure(
    size: str,
    subject: Subject,
    loop: EncoderLoop,
    expected: np.ndarray,
    port: int,
    options: argparse.Namespace,
    comparisons: list[harness.Comparison],
) -> dict[str, Any]:
    """All measurements of one size of model, by part; comparisons with the loop are appended to `comparisons`."""
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
            worst = check_equal(served, subject, expected)
            path, bodies = subject.bodies()["embeddings"]
            encoded = [json.dumps(body) for body in bodies]
            rates = [serve_wrk.load(served.address + path, encoded, 64, 3, folder).rate for _ in range(3)]
            capacity = statistics.median(rates)
            if "load" in parts:
                part("batched", lambda: by_concurrency(served, subject, options.seconds, folder))
                print_tables([load_table(f"{size}: batched", found["batched"])])
            if "saturation" in parts:
                comparisons += saturation(size, served, subject, loop, options.seconds, folder, worst)
            if "overload" in parts:
                part("overload", lambda: overload(served, subject, expected, capacity, 20))
            if "kills" in parts and size == options.sizes[0]:
                part("kills", lambda: kills(served, subject, expected, capacity))
            if "fuzz" in parts and size == options.sizes[0]:
                part("fuzz", lambda: fuzz(served, options.fuzz))
        if "load" in parts:
            with Served(subject, port, folder, batching={"tokens": 1}) as served:
                check_equal(served, subject, expected)
                part("one by one", lambda: by_concurrency(served, subject, options.seconds, folder))
                print_tables([load_table(f"{size}: one by one", found["one by one"])])
    return found


def load_table(title: str, rows: Sequence[dict[str, Any]]) -> TextTable:
    """Throughput and latency by kind of request and concurrency, from the rows of `by_concurrency`."""
    cells = [
        [
            row["kind"],
            f"{row['concurrency']}",
            f"{row['rate']:.1f}",
            *(f"{row[name]:.1f}" for name in ("p50", "p95", "p99")),
            f"{row['refused']}",
            f"{row['broken']}",
        ]
        for row in rows
    ]
    columns = ["request", "concurrency", "per second", "p50 ms", "p95 ms", "p99 ms", "refused", "broken"]
    return TextTable(title, columns, cells)


if __name__ == "__main__":
    sys.exit(main())
