"""Closed-loop load by wrk, a process of its own: request bodies from a file, rate and latency percentiles as result."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
local bodies, turn = {}, 0
for line in io.lines("BODIES") do bodies[#bodies + 1] = line end
local headers = { ["Content-Type"] = "application/json" }
function request()
  turn = turn + 1
  local body = bodies[(turn - 1) % #bodies + 1]
  return wrk.format("POST", nil, headers, (body:gsub("@TURN@", tostring(turn))))
end
function done(summary, latency, requests)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  print(string.format(
    'RESULT {"requests": %d, "seconds": %.6f, "refused": %d, "broken": %d, "p50": %.3f, "p95": %.3f, "p99": %.3f}',
    summary.requests, summary.duration / 1e6, errors.status, broken,
    latency:percentile(50) / 1e3, latency:percentile(95) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Load:
    """Result of a window of load.

    Attributes:
        rate: responses with status 2xx per second.
        p50: median latency in ms; likewise `p95`, `p99`.
        refused: number of responses with another status.
        broken: number of requests without a response.
    """

    concurrency: int
    rate: float
    p50: float
    p95: float
    p99: float
    refused: int
    broken: int


def available() -> bool:
    """Whether wrk is installed."""
    return shutil.which("wrk") is not None


def load(address: str, bodies: Sequence[str], concurrency: int, seconds: float, folder: Path) -> Load:
    """Post `bodies` in turn over `concurrency` connections; `@TURN@` in a body becomes a running number.

    Args:
        folder: folder for the files that wrk reads.

    Raises:
        RuntimeError: wrk printed no result.
    """
    (folder / "bodies.jsonl").write_text("\n".join(bodies) + "\n")
    (folder / "load.lua").write_text(_SCRIPT.replace("BODIES", str(folder / "bodies.jsonl")))
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds:g}s", "--timeout", "60s", "-s", str(folder / "load.lua")]
    done = subprocess.run([*command, address], capture_output=True, text=True, check=True)
    found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"wrk printed no result: {done.stdout} {done.stderr}")
    result = json.loads(found.group(1))
    answered = result["requests"] - result["refused"]
    return Load(
        concurrency=concurrency,
        rate=answered / result["seconds"],
        p50=result["p50"],
        p95=result["p95"],
        p99=result["p99"],
        refused=result["refused"],
        broken=result["broken"],
    )
