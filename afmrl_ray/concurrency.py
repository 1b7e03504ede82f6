"""Asyncio building blocks without Ray: dynamic batching, a single-flight cache, an event loop on a thread.

`DynamicBatcher` and `SingleFlightCache` must be used from one event loop each.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    since: float
    result: asyncio.Future[Result]


class DynamicBatcher(Generic[Item, Result]):
    """Runs items in batches, one batch at a time, first in, first out.

    A batch starts when its first item has waited `wait_s` or when the queued items reach the budget. While a batch
    runs, later items queue up for the next one.

    Args:
        run: returns one result per item of a batch.
        cost: cost of an item, in the unit of the budget.
        budget: largest cost of a batch; an item that costs more runs alone.
        wait_s: longest time that an item waits for others, seconds; 0 = every item runs alone.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result]]],
        *,
        cost: Callable[[Item], int],
        budget: int,
        wait_s: float,
    ) -> None:
        self._run, self._cost, self._budget, self._wait_s = run, cost, budget, wait_s
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._waiting_cost = 0
        self._arrived = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Number of queued items."""
        return len(self._waiting)

    async def submit(self, item: Item) -> Result:
        """Queue an item and wait for its result.

        Raises:
            Exception: what `run` raised; when a batch of several fails, each of its items is run again alone.
        """
        loop = asyncio.get_running_loop()
        entry: _Waiting[Item, Result] = _Waiting(item, loop.time(), loop.create_future())
        self._waiting.append(entry)
        self._waiting_cost += self._cost(item)
        self._arrived.set()
        if self._loop is None:
            self._loop = loop.create_task(self._batches())
        return await entry.result

    async def _batches(self) -> None:
        while True:
            await self._until_due()
            await self._answer(self._take())

    async def _until_due(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        while self._wait_s and self._waiting_cost < self._budget:
            left = self._waiting[0].since + self._wait_s - loop.time()
            if left <= 0:
                return
            self._arrived.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _take(self) -> list[_Waiting[Item, Result]]:
        taken = [self._waiting.popleft()]
        cost = self._cost(taken[0].item)
        while self._wait_s and self._waiting and cost + self._cost(self._waiting[0].item) <= self._budget:
            taken.append(self._waiting.popleft())
            cost += self._cost(taken[-1].item)
        self._waiting_cost -= cost
        return taken

    async def _answer(self, batch: list[_Waiting[Item, Result]]) -> None:
        (found,) = await asyncio.gather(self._run([entry.item for entry in batch]), return_exceptions=True)
        if isinstance(found, BaseException) and len(batch) > 1:
            for entry in batch:
                await self._answer([entry])
            return
        for place, entry in enumerate(batch):
            if entry.result.done():  # the caller was cancelled
                continue
            if isinstance(found, BaseException):
                entry.result.set_exception(found)
            else:
                entry.result.set_result(found[place])


@dataclass(frozen=True)
class Answers(Generic[Key, Result]):
    """Values by key, and where they came from.

    Attributes:
        found: value of each key.
        kept: number of keys whose value was in the cache.
        joined: number of keys that another call was computing.
    """

    found: dict[Key, Result]
    kept: int
    joined: int


class SingleFlightCache(Generic[Key, Result]):
    """A least-recently-used cache that computes a key once, however many callers ask for it at the same time.

    Args:
        compute: returns the values of keys that are not in the cache.
        size: number of values kept; 0 = no cache, and concurrent callers do not share a computation either.
    """

    def __init__(self, compute: Callable[[list[Key]], Awaitable[Mapping[Key, Result]]], *, size: int) -> None:
        self._compute, self._size = compute, size
        self._kept: OrderedDict[Key, Result] = OrderedDict()
        self._running: dict[Key, asyncio.Task[Mapping[Key, Result]]] = {}

    async def get(self, keys: Sequence[Key]) -> Answers[Key, Result]:
        """Values of keys; duplicates count once.

        A computation goes on when the caller that started it is cancelled, since others may wait for it.

        Raises:
            Exception: what `compute` raised for any of the keys; failures are not cached.
        """
        unique = list(dict.fromkeys(keys))
        kept = {key: self._kept[key] for key in unique if key in self._kept}
        for key in kept:
            self._kept.move_to_end(key)
        tasks = {key: self._running[key] for key in unique if key in self._running}
        joined = len(tasks)
        new = [key for key in unique if key not in kept and key not in tasks]
        if new:
            task = asyncio.get_running_loop().create_task(self._compute_and_keep(new))
            tasks.update(dict.fromkeys(new, task))
            if self._size:
                self._running.update(dict.fromkeys(new, task))
        for task in set(tasks.values()):
            await asyncio.shield(task)
        found = {key: kept[key] if key in kept else tasks[key].result()[key] for key in unique}
        return Answers(found, len(kept), joined)

    async def _compute_and_keep(self, keys: list[Key]) -> Mapping[Key, Result]:
        try:
            found = await self._compute(keys)
        finally:
            if self._size:
                for key in keys:
                    del self._running[key]
        if self._size:
            self._kept.update(found)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return found


class BackgroundLoop:
    """An event loop on a daemon thread, so that synchronous code can run coroutines; ends with `close`.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Schedule a coroutine; may be called from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what still runs and join the thread."""
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_all(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
