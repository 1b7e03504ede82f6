from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_ray.concurrency import Answers, BackgroundLoop, DynamicBatcher, SingleFlightCache


def batched(items: list[int], *, budget: int, wait_s: float, fails: int | None = None, pause: float = 0.0):
    """Submit items together, each with itself as cost; returns their results and the batches."""
    batches: list[list[int]] = []

    async def run(batch: list[int]) -> list[int]:
        batches.append(batch)
        await asyncio.sleep(pause)
        if fails in batch:
            raise MemoryError(f"{len(batch)} together")
        return [-item for item in batch]

    async def main():
        made = DynamicBatcher(run, cost=lambda item: item, budget=budget, wait_s=wait_s)
        return await asyncio.gather(*(made.submit(item) for item in items), return_exceptions=True)

    return asyncio.run(main()), batches


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 30))
def test_batches_hold_every_item_once_in_order_within_the_budget(items, budget):
    results, batches = batched(items, budget=budget, wait_s=0.001)
    assert results == [-item for item in items]
    assert [item for batch in batches for item in batch] == items
    assert all(sum(batch) <= budget or len(batch) == 1 for batch in batches)
    together = pairwise(batches)
    assert all(sum(first) + second[0] > budget for first, second in together)


def test_without_a_wait_every_item_runs_alone():
    assert batched([1, 2, 3], budget=100, wait_s=0)[1] == [[1], [2], [3]]


def test_the_budget_ends_the_wait():
    assert batched([5, 5], budget=10, wait_s=3600) == ([-5, -5], [[5, 5]])


def test_a_failing_item_does_not_fail_its_batch():
    results, batches = batched([1, 2, 3], budget=10, wait_s=0.001, fails=2)
    assert [results[0], results[2]] == [-1, -3]
    assert isinstance(results[1], MemoryError)
    assert batches == [[1, 2, 3], [1], [2], [3]]


def test_items_queue_while_a_batch_runs():
    async def main():
        batches: list[list[int]] = []

        async def run(batch: list[int]) -> list[int]:
            batches.append(batch)
            await gate.wait()
            return batch

        gate = asyncio.Event()
        made = DynamicBatcher(run, cost=lambda item: 1, budget=3, wait_s=1e-4)
        calls = [asyncio.ensure_future(made.submit(0))]
        while not batches:
            await asyncio.sleep(0)
        calls += [asyncio.ensure_future(made.submit(item)) for item in range(1, 6)]
        await asyncio.sleep(0)
        assert made.depth == 5
        gate.set()
        await asyncio.gather(*calls)
        return batches

    assert asyncio.run(main()) == [[0], [1, 2, 3], [4, 5]]


class Compute:
    """Records the keys that are computed; `gate` delays the values."""

    def __init__(self, *, open_: bool = True) -> None:
        self.computed: list[str] = []
        self.gate = asyncio.Event()
        if open_:
            self.gate.set()
        self.failing = False

    async def __call__(self, keys: list[str]) -> dict[str, str]:
        self.computed += keys
        await self.gate.wait()
        if self.failing:
            raise OSError("gone")
        return {key: key.upper() for key in keys}


def test_equal_keys_are_computed_once_also_by_concurrent_callers():
    async def main():
        compute = Compute(open_=False)
        cache = SingleFlightCache(compute, size=10)
        calls = [asyncio.ensure_future(cache.get(keys)) for keys in (["a", "b", "a"], ["b", "c"], ["a"])]
        await asyncio.sleep(0.01)
        compute.gate.set()
        found = await asyncio.gather(*calls)
        assert [each.found for each in found] == [{"a": "A", "b": "B"}, {"b": "B", "c": "C"}, {"a": "A"}]
        assert [(each.kept, each.joined) for each in found] == [(0, 0), (0, 1), (0, 1)]
        assert await cache.get(["c", "a"]) == Answers({"c": "C", "a": "A"}, kept=2, joined=0)
        assert compute.computed == ["a", "b", "c"]

    asyncio.run(main())


def test_the_least_recently_used_values_are_dropped():
    async def main():
        compute = Compute()
        cache = SingleFlightCache(compute, size=2)
        for keys in (["a"], ["b"], ["a"], ["c"], ["a"], ["b"]):
            await cache.get(keys)
        assert compute.computed == ["a", "b", "c", "b"]
        assert (await cache.get(["a", "b", "c", "d"])).found == {key: key.upper() for key in "abcd"}

    asyncio.run(main())


def test_without_a_size_nothing_is_shared():
    async def main():
        compute = Compute(open_=False)
        cache = SingleFlightCache(compute, size=0)
        calls = [asyncio.ensure_future(cache.get(["a", "a"])) for _ in range(2)]
        await asyncio.sleep(0)
        compute.gate.set()
        assert [each.found for each in await asyncio.gather(*calls)] == [{"a": "A"}] * 2
        assert compute.computed == ["a", "a"]

    asyncio.run(main())


def test_a_cancelled_caller_does_not_cancel_the_others_and_failures_are_not_cached():
    async def main():
        compute = Compute(open_=False)
        cache = SingleFlightCache(compute, size=10)
        first = asyncio.ensure_future(cache.get(["a"]))
        second = asyncio.ensure_future(cache.get(["a"]))
        await asyncio.sleep(0.01)
        first.cancel()
        compute.gate.set()
        assert (await second).found == {"a": "A"}
        compute.failing = True
        with pytest.raises(OSError, match="gone"):
            await cache.get(["a", "b"])
        compute.failing = False
        assert (await cache.get(["b"])).found == {"b": "B"}
        assert compute.computed == ["a", "b", "b"]

    asyncio.run(main())


def test_a_background_loop_runs_coroutines_and_cancels_what_is_left_at_its_end():
    async def double(value: int) -> int:
        return 2 * value

    loop = BackgroundLoop("test")
    assert loop.start(double(4)).result(10) == 8
    endless = loop.start(asyncio.sleep(3600))
    loop.close()
    assert endless.cancelled()
