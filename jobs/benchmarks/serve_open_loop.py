"""Open-loop load, run as a process of its own: requests at a fixed rate, whatever the latency; responses are checked.

Reads `{"address", "rate", "seconds", "requests": [{"body", "wanted"}]}` from standard input, where `wanted` is the
expected embedding, and prints `{"offered", "statuses", "wrong", "without_retry_after", "accepted_ms"}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
import numpy as np

_CLOSE = 1e-3
_TIMEOUT_S = 90


class Tally:
    """Counts of responses, and latencies of accepted requests."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.wrong = 0
        self.without_retry_after = 0
        self.accepted_ms: list[float] = []

    async def ask(self, session: aiohttp.ClientSession, address: str, request: dict[str, Any]) -> None:
        began = time.perf_counter()
        try:
            async with session.post(address, json=request["body"]) as answer:
                body = await answer.read()
                status, headers = answer.status, answer.headers
        except (TimeoutError, aiohttp.ClientError) as error:
            self.statuses[type(error).__name__] += 1
            return
        self.statuses[str(status)] += 1
        if status == 200:
            self.accepted_ms.append(1000 * (time.perf_counter() - began))
            vector = np.asarray(json.loads(body)["data"][0]["embedding"])
            self.wrong += bool(np.abs(vector - np.asarray(request["wanted"])).max() > _CLOSE)
        elif status == 503:
            self.without_retry_after += "retry-after" not in headers


async def main(order: dict[str, Any]) -> dict[str, Any]:
    tally, tasks = Tally(), []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        began, sent = time.perf_counter(), 0
        while (now := time.perf_counter() - began) < order["seconds"]:
            while sent < now * order["rate"]:
                request = order["requests"][sent % len(order["requests"])]
                tasks.append(asyncio.create_task(tally.ask(session, order["address"], request)))
                sent += 1
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
    return {
        "offered": sent,
        "statuses": dict(tally.statuses),
        "wrong": tally.wrong,
        "without_retry_after": tally.without_retry_after,
        "accepted_ms": tally.accepted_ms,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.load(sys.stdin)))))
