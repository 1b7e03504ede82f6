"""What the API does, over three ports (encoder, generator, index) that are Ray Serve deployments or plain objects.

A request names one bundle in every call, so it never mixes rounds; where another took over meanwhile, it starts again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any, Literal, Protocol

import numpy as np

from afmrl_ray.cit.index_stage import ItemRecord
from afmrl_ray.concurrency import SingleFlightCache
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.errors import Overloaded, Problem
from afmrl_ray.serving.models import Embedding, EncoderInput
from afmrl_ray.serving.round_index import Filters, Hit
from afmrl_ray.serving.store import Embedded, State, StoredItem
from afmrl_ray.serving.uploads import Upload

log = logging.getLogger(__name__)

AttributesSource = Literal["generated", "given", "none"]

_ATTEMPTS = 4
_REEMBED_AT_ONCE = 32
_CURRENT_FOR_S = 1.0


class EncoderPort(Protocol):
    """The encoder."""

    def embed(self, bundle: Bundle, given: Sequence[EncoderInput]) -> Awaitable[list[Embedding]]: ...

    def prepare(self, bundle: Bundle) -> Awaitable[None]: ...


class GeneratorPort(Protocol):
    """The generator; `write` gives attribute text and reason of invalidity."""

    def write(self, bundle: Bundle, upload: Upload) -> Awaitable[tuple[str, str]]: ...

    def prepare(self, bundle: Bundle) -> Awaitable[None]: ...


class IndexPort(Protocol):
    """The index and the store; see `round_index.LiveIndex` and `store.ItemStore`."""

    def state(self) -> Awaitable[State]: ...

    def search(self, key: str, vector: np.ndarray, k: int, filters: Filters) -> Awaitable[list[Hit] | None]: ...

    def upsert(self, item: StoredItem, embedded: dict[str, Embedded]) -> Awaitable[dict[str, Bundle] | None]: ...

    def delete(self, item_id: str) -> Awaitable[bool]: ...

    def get(self, item_id: str) -> Awaitable[ItemRecord | None]: ...

    def size(self) -> Awaitable[int]: ...

    def prepare(self, bundle: Bundle) -> Awaitable[None]: ...

    def begin_switch(self, bundle: Bundle) -> Awaitable[None]: ...

    def lacking(self, key: str, limit: int) -> Awaitable[list[StoredItem]]: ...

    def add_vector(self, item: StoredItem, key: str, embedded: Embedded) -> Awaitable[None]: ...

    def finish_switch(self, key: str) -> Awaitable[bool]: ...


class Meter(Protocol):
    """Told of what happens."""

    def spent(self, stage: str, seconds: float) -> None: ...

    def cached(self, hit: bool) -> None: ...


@dataclass(frozen=True)
class AttributeResult:
    """Attributes as they were used.

    Attributes:
        text: canonical text; empty = none.
        source: where they came from.
        reason: why the generator's are not used; empty = they are.
        cached: whether they had been written before.
    """

    text: str
    source: AttributesSource
    reason: str = ""
    cached: bool = False


@dataclass(frozen=True)
class SearchResult:
    """The answer to a search; `milliseconds` by stage."""

    hits: list[Hit]
    attributes: AttributeResult
    bundle: Bundle
    milliseconds: dict[str, float]


class SearchService:
    """The application's logic.

    Args:
        encoder: port.
        generator: port.
        index: port.
        cached_attributes: texts that are remembered, by image, title and generator.
        meter: told of stages and the cache.
    """

    def __init__(
        self, encoder: EncoderPort, generator: GeneratorPort, index: IndexPort, *, cached_attributes: int, meter: Meter
    ) -> None:
        self._encoder, self._generator, self._index, self._meter = encoder, generator, index, meter
        self._uploads: dict[tuple[str, str], tuple[Bundle, Upload]] = {}
        self._written: SingleFlightCache[tuple[str, str], tuple[str, str]] = SingleFlightCache(
            self._write, size=cached_attributes
        )
        self._rollover = asyncio.Lock()
        self._known: tuple[float, Bundle] | None = None

    async def current(self) -> Bundle:
        """The bundle that is served, as it was at most a second ago: a whole round in any case, and a search in one
        that was replaced is noticed by the index."""
        if self._known is None or monotonic() - self._known[0] > _CURRENT_FOR_S:
            self._known = monotonic(), (await self.state()).current
        return self._known[1]

    async def state(self) -> State:
        """What is served."""
        return await self._index.state()

    async def size(self) -> int:
        """Items that can be found."""
        return await self._index.size()

    async def _write(self, keys: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
        (key,) = keys
        return {key: await self._generator.write(*self._uploads[key])}

    async def attributes(self, bundle: Bundle, upload: Upload) -> AttributeResult:
        """What the generator of a bundle writes; once for equal images and titles."""
        key = bundle.fingerprints["generator"], upload.digest
        self._uploads[key] = bundle, upload
        try:
            answers = await self._written.get([key])
        finally:
            self._uploads.pop(key, None)
        self._meter.cached(bool(answers.kept))
        text, reason = answers.found[key]
        return AttributeResult(text, "generated" if text else "none", reason, bool(answers.kept))

    async def attributes_for(
        self, bundle: Bundle, upload: Upload, attributes_source: AttributesSource, given: str
    ) -> AttributeResult:
        """The attributes that a request asks for."""
        if attributes_source == "generated":
            return await self.attributes(bundle, upload)
        return AttributeResult(given, "given") if attributes_source == "given" else AttributeResult("", "none")

    async def embed(self, bundle: Bundle, given: Sequence[EncoderInput]) -> list[Embedding]:
        """Vectors of items under a bundle."""
        return await self._encoder.embed(bundle, given)

    async def search(
        self, upload: Upload, *, k: int, filters: Filters, attributes_source: AttributesSource, given: str
    ) -> SearchResult:
        """Choose attributes, embed, search: all under one bundle."""
        for _ in range(_ATTEMPTS):
            spent: dict[str, float] = {}
            bundle = await self.current()
            with self._timed("attributes", spent):
                written = await self.attributes_for(bundle, upload, attributes_source, given)
            with self._timed("embedding", spent):
                (embedding,) = await self.embed(bundle, [EncoderInput(upload, written.text)])
            with self._timed("index", spent):
                hits = await self._index.search(bundle.key, embedding.vector, k, filters)
            if hits is not None:
                return SearchResult(hits, written, bundle, spent)
            self._known = None
        raise Overloaded("the served round changed again and again")

    @contextmanager
    def _timed(self, stage: str, spent: dict[str, float]) -> Iterator[None]:
        began = perf_counter()
        yield
        seconds = perf_counter() - began
        self._meter.spent(stage, seconds)
        spent[stage] = round(1000 * seconds, 2)

    async def upsert(self, item: StoredItem) -> tuple[State, AttributeResult]:
        """Put an item in under every bundle that needs it; durable when this returns."""
        upload = Upload(item.title, item.image)
        state = await self._index.state()
        needed, embedded, written = state.needed, {}, AttributeResult("", "none")
        for _ in range(_ATTEMPTS):
            for key, bundle in needed.items():
                written, embedded[key] = await self._embedded(bundle, upload, item.given)
            missing = await self._index.upsert(item, embedded)
            if missing is None:
                return state, written
            needed = missing
        raise Overloaded("the served round changed again and again")

    async def _embedded(self, bundle: Bundle, upload: Upload, given: str | None) -> tuple[AttributeResult, Embedded]:
        written = await self.attributes_for(bundle, upload, "generated" if given is None else "given", given or "")
        (embedding,) = await self.embed(bundle, [EncoderInput(upload, written.text)])
        return written, Embedded(written.text, embedding.vector)

    async def delete(self, item_id: str) -> bool:
        """Take an item out; whether it was there."""
        return await self._index.delete(item_id)

    async def get(self, item_id: str) -> ItemRecord | None:
        """An item that can be found."""
        return await self._index.get(item_id)

    async def switch(self, bundle: Bundle) -> dict[str, Any]:
        """Go over to a bundle: have it ready everywhere, embed what was put in, then switch.

        Raises:
            Problem: another switch is under way, or one to another bundle took over.
        """
        if self._rollover.locked():
            raise Problem(409, "a switch is under way; ask again when it is done")
        async with self._rollover:
            before = (await self._index.state()).current
            if before.key == bundle.key:
                return {"served": bundle.key, "before": before.key, "embedded": 0}
            await self._index.begin_switch(bundle)
            await asyncio.gather(*(port.prepare(bundle) for port in (self._encoder, self._generator, self._index)))
            count = 0
            while True:
                lacking = await self._index.lacking(bundle.key, _REEMBED_AT_ONCE)
                for item in lacking:
                    _, embedded = await self._embedded(bundle, Upload(item.title, item.image), item.given)
                    await self._index.add_vector(item, bundle.key, embedded)
                count += len(lacking)
                if lacking:
                    continue
                if await self._index.finish_switch(bundle.key):
                    break
                state = await self._index.state()
                if state.current.key == bundle.key:
                    break
                if state.rolling is None or state.rolling.key != bundle.key:
                    raise Problem(409, f"the switch to {bundle.key} gave way to another one")
            self._known = None
            log.info("switch: %s took over from %s, %d items embedded anew", bundle.key, before.key, count)
            return {"served": bundle.key, "before": before.key, "embedded": count}
