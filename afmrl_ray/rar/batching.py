"""Requests of many askers made into batches, and equal questions answered once: plain asyncio, without Ray.

Both must be used from one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


@dataclass
class _Waiting(Generic[Item, Result]):
    item: Item
    since: float
    result: asyncio.Future[Result]


class DynamicBatcher(Generic[Item, Result]):
    """Runs items in batches, one batch at a time, in the order in which they came.

    A batch begins once its first item has waited `wait_s` or the items reach the budget, and while one runs the next
    ones gather.

    Args:
        run: gives a result for each item of a batch.
        cost: of an item.
        budget: most that a batch costs; an item that costs more runs alone.
        wait_s: longest wait of an item for company, seconds; 0 = every item runs alone.
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
        """Items that wait for their batch."""
        return len(self._waiting)

    async def submit(self, item: Item) -> Result:
        """The result of one item.

        Raises:
            Exception: what `run` raised for it; where a batch fails, each of its items is tried alone.
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
            if entry.result.done():  # whoever asked has gone
                continue
            if isinstance(found, BaseException):
                entry.result.set_exception(found)
            else:
                entry.result.set_result(found[place])


@dataclass(frozen=True)
class Answers(Generic[Key, Result]):
    """Answers by key.

    Attributes:
        found: by key.
        kept: keys among them whose answer was known.
        joined: keys among them that were being computed for somebody else.
    """

    found: dict[Key, Result]
    kept: int
    joined: int


class SingleFlightCache(Generic[Key, Result]):
    """Answers each key once: the latest answers are kept, and who asks for what is being computed waits for it.

    Args:
        compute: answers keys that are not known.
        size: answers kept; 0 = none, and nobody waits for another's either.
    """

    def __init__(self, compute: Callable[[list[Key]], Awaitable[Mapping[Key, Result]]], *, size: int) -> None:
        self._compute, self._size = compute, size
        self._kept: OrderedDict[Key, Result] = OrderedDict()
        self._running: dict[Key, asyncio.Task[Mapping[Key, Result]]] = {}

    async def get(self, keys: Sequence[Key]) -> Answers[Key, Result]:
        """Answer keys; equal ones are one.

        What a caller that is cancelled has begun is finished, since others may wait for it.

        Raises:
            Exception: what `compute` raised for any of them; it is asked again next time.
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
