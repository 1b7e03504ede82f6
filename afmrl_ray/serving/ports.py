"""The ports of `service.SearchService`: handles of deployments implement them, and plain objects can."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

import numpy as np

from afmrl_ray.retrieval.item_table import ItemRecord
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.models import Embedding, EncoderInput
from afmrl_ray.serving.records import EmbeddedItem, State, StoredItem
from afmrl_ray.serving.round_index import Filters, Hit
from afmrl_ray.serving.uploads import Upload


class EncoderPort(Protocol):
    """The encoder; see `deployments.EncoderDeployment`."""

    def embed(self, bundle: Bundle, inputs: Sequence[EncoderInput]) -> Awaitable[list[Embedding]]: ...

    def prepare(self, bundle: Bundle) -> Awaitable[None]: ...


class GeneratorPort(Protocol):
    """The generator; `write` returns attribute text and reason of invalidity, one of them empty."""

    def write(self, bundle: Bundle, upload: Upload) -> Awaitable[tuple[str, str]]: ...

    def prepare(self, bundle: Bundle) -> Awaitable[None]: ...


class IndexPort(Protocol):
    """The index and the item store; see `live_index.LiveIndex` and `store.ItemStore`."""

    def state(self) -> Awaitable[State]: ...

    def search(self, key: str, vector: np.ndarray, k: int, filters: Filters) -> Awaitable[list[Hit] | None]: ...

    def upsert(self, item: StoredItem, embedded: dict[str, EmbeddedItem]) -> Awaitable[dict[str, Bundle] | None]: ...

    def delete(self, item_id: str) -> Awaitable[bool]: ...

    def get(self, item_id: str) -> Awaitable[ItemRecord | None]: ...

    def size(self) -> Awaitable[int]: ...

    def prepare(self, bundle: Bundle) -> Awaitable[None]: ...

    def begin_switch(self, bundle: Bundle) -> Awaitable[None]: ...

    def without_vector(self, key: str, limit: int) -> Awaitable[list[StoredItem]]: ...

    def add_vector(self, item: StoredItem, key: str, embedded: EmbeddedItem) -> Awaitable[None]: ...

    def finish_switch(self, key: str) -> Awaitable[bool]: ...


class Meter(Protocol):
    """Records what the service does; see `metrics.ServingMetrics`."""

    def stage(self, name: str, seconds: float) -> None: ...

    def attribute_cache(self, *, hit: bool) -> None: ...
