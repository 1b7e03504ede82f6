"""What the API does, over three ports (encoder, generator, index) that are Ray Serve deployments or plain objects.

A request names one bundle in all of its calls, so an answer never mixes rounds; if another bundle is served meanwhile,
the request starts again under that one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Literal

from afmrl_ray.concurrency import SingleFlightCache
from afmrl_ray.retrieval.item_table import ItemRecord
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.errors import Overloaded, Problem
from afmrl_ray.serving.models import Embedding, EncoderInput
from afmrl_ray.serving.ports import EncoderPort, GeneratorPort, IndexPort, Meter
from afmrl_ray.serving.records import EmbeddedItem, State, StoredItem
from afmrl_ray.serving.round_index import Filters, Hit
from afmrl_ray.serving.uploads import Upload

log = logging.getLogger(__name__)

AttributesSource = Literal["generated", "given", "none"]

_ATTEMPTS = 4
_SWITCH_CHUNK = 32
_STATE_MAX_AGE_S = 1.0


@dataclass(frozen=True)
class AttributeResult:
    """The attributes that are used for an item.

    Attributes:
        text: canonical text; empty = none.
        source: where they came from.
        reason: why the generator's are not used; empty = they are.
        cached: whether they came from the cache.
    """

    text: str
    source: AttributesSource
    reason: str = ""
    cached: bool = False


@dataclass(frozen=True)
class SearchResult:
    """The answer to a search; `milliseconds` is the time by stage."""

    hits: list[Hit]
    attributes: AttributeResult
    bundle: Bundle
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class SwitchResult:
    """A switch that is done.

    Attributes:
        served: key of the bundle that is served now.
        before: key of the bundle that was served before.
        embedded: number of upserted items that were embedded for the switch.
    """

    served: str
    before: str
    embedded: int


class SearchService:
    """The application's logic.

    Args:
        encoder: port.
        generator: port.
        index: port.
        cached_attributes: number of generated texts that are cached, by image, title and generator.
        meter: records stages and use of the cache.
    """

    def __init__(
        self, encoder: EncoderPort, generator: GeneratorPort, index: IndexPort, *, cached_attributes: int, meter: Meter
    ) -> None:
        self._encoder, self._generator, self._index, self._meter = encoder, generator, index, meter
        self._uploads: dict[tuple[str, str], tuple[Bundle, Upload]] = {}
        self._attribute_cache: SingleFlightCache[tuple[str, str], tuple[str, str]] = SingleFlightCache(
            self._generate, size=cached_attributes
        )
        self._switch_lock = asyncio.Lock()
        self._latest: tuple[float, Bundle] | None = None

    async def current(self) -> Bundle:
        """The served bundle, as it was at most a second ago; a search under a replaced one is repeated."""
        if self._latest is None or monotonic() - self._latest[0] > _STATE_MAX_AGE_S:
            self._latest = monotonic(), (await self.state()).current
        return self._latest[1]

    async def state(self) -> State:
        """What is served."""
        return await self._index.state()

    async def size(self) -> int:
        """Number of items that can be found."""
        return await self._index.size()

    async def _generate(self, keys: list[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
        (key,) = keys
        return {key: await self._generator.write(*self._uploads[key])}

    async def attributes(self, bundle: Bundle, upload: Upload) -> AttributeResult:
        """What the generator of a bundle writes, once for equal images and titles."""
        key = bundle.fingerprints["generator"], upload.digest
        self._uploads[key] = bundle, upload
        try:
            answers = await self._attribute_cache.get([key])
        finally:
            self._uploads.pop(key, None)
        self._meter.attribute_cache(hit=bool(answers.kept))
        text, reason = answers.found[key]
        return AttributeResult(text, "generated" if text else "none", reason, bool(answers.kept))

    async def attributes_for(
        self, bundle: Bundle, upload: Upload, attributes_source: AttributesSource, given: str
    ) -> AttributeResult:
        """The attributes that a request asks for; `given` is the text for the source `given`."""
        if attributes_source == "generated":
            return await self.attributes(bundle, upload)
        return AttributeResult(given, "given") if attributes_source == "given" else AttributeResult("", "none")

    async def embed(self, bundle: Bundle, inputs: Sequence[EncoderInput]) -> list[Embedding]:
        """Embeddings of items under a bundle."""
        return await self._encoder.embed(bundle, inputs)

    async def search(
        self, upload: Upload, *, k: int, filters: Filters, attributes_source: AttributesSource, given: str
    ) -> SearchResult:
        """Choose attributes, embed and search, all under one bundle.

        Raises:
            Overloaded: the served bundle changed at every attempt.
        """
        for _ in range(_ATTEMPTS):
            milliseconds: dict[str, float] = {}
            bundle = await self.current()
            with self._timed("attributes", milliseconds):
                attributes = await self.attributes_for(bundle, upload, attributes_source, given)
            with self._timed("embedding", milliseconds):
                (embedding,) = await self.embed(bundle, [EncoderInput(upload, attributes.text)])
            with self._timed("index", milliseconds):
                hits = await self._index.search(bundle.key, embedding.vector, k, filters)
            if hits is not None:
                return SearchResult(hits, attributes, bundle, milliseconds)
            self._latest = None
        raise Overloaded("the served round changed at every attempt")

    @contextmanager
    def _timed(self, stage: str, milliseconds: dict[str, float]) -> Iterator[None]:
        began = perf_counter()
        yield
        seconds = perf_counter() - began
        self._meter.stage(stage, seconds)
        milliseconds[stage] = round(1000 * seconds, 2)

    async def upsert(self, item: StoredItem) -> AttributeResult:
        """Insert or replace an item under every bundle that needs it; it is durable when this returns.

        Returns:
            Its attributes under the last of the bundles.

        Raises:
            Overloaded: the needed bundles changed at every attempt.
        """
        upload = Upload(item.title, item.image)
        needed = (await self._index.state()).needed
        embedded: dict[str, EmbeddedItem] = {}
        attributes = AttributeResult("", "none")
        for _ in range(_ATTEMPTS):
            for key, bundle in needed.items():
                attributes, embedded[key] = await self._embed_item(bundle, upload, item.given)
            missing = await self._index.upsert(item, embedded)
            if missing is None:
                return attributes
            needed = missing
        raise Overloaded("the served round changed at every attempt")

    async def _embed_item(
        self, bundle: Bundle, upload: Upload, given: str | None
    ) -> tuple[AttributeResult, EmbeddedItem]:
        source: AttributesSource = "generated" if given is None else "given"
        attributes = await self.attributes_for(bundle, upload, source, given or "")
        (embedding,) = await self.embed(bundle, [EncoderInput(upload, attributes.text)])
        return attributes, EmbeddedItem(attributes.text, embedding.vector)

    async def delete(self, item_id: str) -> bool:
        """Delete an item; whether it existed."""
        return await self._index.delete(item_id)

    async def get(self, item_id: str) -> ItemRecord | None:
        """An item that can be found, or None."""
        return await self._index.get(item_id)

    async def switch(self, bundle: Bundle) -> SwitchResult:
        """Serve another bundle: load it everywhere, embed the upserted items under it, then switch.

        Raises:
            Problem: 409, another switch is under way, or one to another bundle replaced this one.
        """
        if self._switch_lock.locked():
            raise Problem(409, "a switch is under way; repeat the request when it is done")
        async with self._switch_lock:
            before = (await self._index.state()).current
            if before.key == bundle.key:
                return SwitchResult(bundle.key, before.key, 0)
            await self._index.begin_switch(bundle)
            await asyncio.gather(*(port.prepare(bundle) for port in (self._encoder, self._generator, self._index)))
            embedded = await self._finish_switch(bundle)
            self._latest = None
            log.info("switched from %s to %s: %d upserted items embedded", before.key, bundle.key, embedded)
            return SwitchResult(bundle.key, before.key, embedded)

    async def _finish_switch(self, bundle: Bundle) -> int:
        """Embed upserted items under the prepared bundle until it can be served; returns their number."""
        count = 0
        while True:
            items = await self._index.without_vector(bundle.key, _SWITCH_CHUNK)
            for item in items:
                _, embedded = await self._embed_item(bundle, Upload(item.title, item.image), item.given)
                await self._index.add_vector(item, bundle.key, embedded)
            count += len(items)
            if items:
                continue
            if await self._index.finish_switch(bundle.key):
                return count
            state = await self._index.state()
            if state.current.key == bundle.key:
                return count
            if state.switching_to is None or state.switching_to.key != bundle.key:
                raise Problem(409, f"the switch to {bundle.key} was replaced by another one")
