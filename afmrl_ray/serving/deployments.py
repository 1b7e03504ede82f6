"""The three inner deployments: Ray Serve's thin shells around `models` and `live_index`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import torch
from ray import serve

from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.threads import torch_threads
from afmrl_ray.retrieval.item_table import ItemRecord
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.live_index import LiveIndex, local_index, merge
from afmrl_ray.serving.models import Embedding, EncoderInput, ServedEncoder, ServedGenerator
from afmrl_ray.serving.records import EmbeddedItem, State, StoredItem
from afmrl_ray.serving.round_index import Filters, Hit
from afmrl_ray.serving.uploads import Upload

_HUNG_AFTER = 10
"""A batch that has been running for this many request timeouts is taken to hang."""


@dataclass(frozen=True)
class _Request:
    """A request to a model; `tokens` is what it costs in a batch."""

    bundle: Bundle
    content: Any
    tokens: int


class _Compute:
    """One thread for the model, so that the replica answers while a batch runs, and a check that batches end.

    Args:
        threads: torch threads.
        hung_s: seconds after which a batch is taken to hang.
    """

    def __init__(self, threads: int, hung_s: float) -> None:
        self._pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self._hung_s = hung_s
        self._since: float | None = None

    async def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        def timed() -> Any:
            self._since = monotonic()
            try:
                return work(*arguments)
            finally:
                self._since = None

        return await asyncio.get_running_loop().run_in_executor(self._pool, timed)

    def check(self) -> None:
        """Let Serve restart the replica if a batch hangs.

        Raises:
            RuntimeError: a batch hangs.
        """
        since = self._since
        if since is not None and monotonic() - since > self._hung_s:
            raise RuntimeError(f"a batch has been running for more than {self._hung_s:g} s")


def _by_bundle(batch: Sequence[_Request]) -> dict[str, list[int]]:
    """Positions of a batch by bundle key: during a switch a batch may hold requests to two bundles."""
    found: dict[str, list[int]] = {}
    for position, request in enumerate(batch):
        found.setdefault(request.bundle.key, []).append(position)
    return found


def _cost(budget: int) -> Callable[[list[_Request]], int]:
    """Tokens of a batch; a request above the budget is a batch of its own."""
    return lambda batch: min(batch[0].tokens, budget) if len(batch) == 1 else sum(each.tokens for each in batch)


def _batched(run: Callable[[list[_Request]], Any], config: ServingConfig) -> Callable[[_Request], Any]:
    """Ray Serve's batching around `run`, by tokens."""
    budget = config.batching.tokens

    @serve.batch(
        max_batch_size=budget,
        batch_wait_timeout_s=config.batching.wait_ms / 1000,
        batch_size_fn=_cost(budget),
    )
    async def batched(batch: list[_Request]) -> list[Any]:
        return await run(batch)

    return batched


class EncoderDeployment:
    """Embeds items; requests are batched by tokens."""

    def __init__(self, config: ServingConfig, bundle: Bundle) -> None:
        threads = torch_threads(config.encoder.cpus)
        self._encoder = ServedEncoder(rounds_kept=config.rounds_kept, tokens=config.batching.tokens)
        self._compute = _Compute(threads, _HUNG_AFTER * config.limits.request_s)
        self._prepare = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._encoder.load(bundle)
        self._batched = _batched(self._run, config)

    async def embed(self, bundle: Bundle, inputs: Sequence[EncoderInput]) -> list[Embedding]:
        """Embeddings of a request's items."""

        def prepare() -> list[ModelInput]:
            return [self._encoder.prepare(bundle, each) for each in inputs]

        rows = await asyncio.get_running_loop().run_in_executor(self._prepare, prepare)
        tokens = sum(len(row) for row in rows)
        vectors = await self._batched(_Request(bundle, rows, tokens))
        return [Embedding(vector, len(row)) for vector, row in zip(vectors, rows, strict=True)]

    async def _run(self, batch: list[_Request]) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for positions in _by_bundle(batch).values():
            counts = [len(batch[position].content) for position in positions]
            rows = [row for position in positions for row in batch[position].content]
            vectors = await self._compute(self._encoder.embed, batch[positions[0]].bundle, rows)
            found.update(zip(positions, np.split(vectors, np.cumsum(counts)[:-1]), strict=True))
        return [found[position] for position in range(len(batch))]

    async def prepare(self, bundle: Bundle) -> None:
        """Load a bundle's model while the served one goes on."""
        await asyncio.to_thread(self._encoder.load, bundle)

    async def pid(self) -> int:
        """Process id of the replica that answers."""
        return os.getpid()

    def check_health(self) -> None:
        self._compute.check()


class GeneratorDeployment:
    """Writes attributes; requests are batched by tokens."""

    def __init__(self, config: ServingConfig, bundle: Bundle) -> None:
        threads = torch_threads(config.generator.cpus)
        self._generator = ServedGenerator(rounds_kept=config.rounds_kept, max_pairs=config.max_pairs)
        self._compute = _Compute(threads, _HUNG_AFTER * config.limits.request_s)
        self._generator.load(bundle)
        self._batched = _batched(self._run, config)

    async def write(self, bundle: Bundle, upload: Upload) -> tuple[str, str]:
        """Attribute text and reason of invalidity."""
        tokens = self._generator.tokens(bundle, upload)
        return await self._batched(_Request(bundle, upload, tokens))

    async def _run(self, batch: list[_Request]) -> list[tuple[str, str]]:
        found: dict[int, tuple[str, str]] = {}
        for positions in _by_bundle(batch).values():
            uploads = [batch[position].content for position in positions]
            written = await self._compute(self._generator.write, batch[positions[0]].bundle, uploads)
            found.update(zip(positions, written, strict=True))
        return [found[position] for position in range(len(batch))]

    async def prepare(self, bundle: Bundle) -> None:
        """Load a bundle's model while the served one goes on."""
        await asyncio.to_thread(self._generator.load, bundle)

    async def pid(self) -> int:
        """Process id of the replica that answers."""
        return os.getpid()

    def check_health(self) -> None:
        self._compute.check()


class IndexDeployment:
    """Searches and stores, all on one thread, to which SQLite and the open indexes belong."""

    def __init__(self, config: ServingConfig, state_dir: str, bundle: Bundle) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._state_dir = state_dir
        self._live = LiveIndex(
            state_dir, bundle, rounds_kept=config.rounds_kept, max_delta_items=config.max_delta_items
        )
        self._merging: asyncio.Task[str | None] | None = None

    async def _on_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    async def state(self) -> State:
        return await self._on_thread(lambda: self._live.state)

    async def search(self, key: str, vector: np.ndarray, k: int, filters: Filters) -> list[Hit] | None:
        """See `LiveIndex.search`."""
        return await self._on_thread(self._live.search, key, vector, k, filters)

    async def upsert(self, item: StoredItem, embedded: dict[str, EmbeddedItem]) -> dict[str, Bundle] | None:
        """See `ItemStore.upsert`."""
        missing = await self._on_thread(self._live.write, lambda store: store.upsert(item, embedded))
        await self._merge_if_due()
        return missing

    async def delete(self, item_id: str) -> bool:
        """See `LiveIndex.delete`."""
        return await self._on_thread(self._live.delete, item_id)

    async def get(self, item_id: str) -> ItemRecord | None:
        return await self._on_thread(lambda: self._live.current().get(item_id))

    async def size(self) -> int:
        return await self._on_thread(lambda: len(self._live.current()))

    async def prepare(self, bundle: Bundle) -> None:
        await asyncio.to_thread(local_index, bundle.index_path)
        await self._on_thread(self._live.prepare, bundle)

    async def begin_switch(self, bundle: Bundle) -> None:
        await self._on_thread(self._live.write, lambda store: store.begin_switch(bundle))

    async def without_vector(self, key: str, limit: int) -> list[StoredItem]:
        return await self._on_thread(lambda: self._live.store.without_vector(key, limit))

    async def add_vector(self, item: StoredItem, key: str, embedded: EmbeddedItem) -> None:
        await self._on_thread(self._live.write, lambda store: store.add_vector(item, key, embedded))

    async def finish_switch(self, key: str) -> bool:
        return await self._on_thread(self._live.write, lambda store: store.finish_switch(key))

    async def _merge_if_due(self) -> None:
        if self._merging is not None and not self._merging.done():
            return
        if await self._on_thread(lambda: self._live.merge_is_due):
            bundle = (await self.state()).current
            self._merging = asyncio.create_task(asyncio.to_thread(merge, self._state_dir, bundle))

    async def pid(self) -> int:
        """Process id of the replica that answers."""
        return os.getpid()

    async def check_health(self) -> None:
        await self._on_thread(self._live.store.version)
