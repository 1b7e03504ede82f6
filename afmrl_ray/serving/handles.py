"""The ports as handles of the deployments; calls are idempotent, so they can be repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from afmrl_ray.retrieval.item_table import ItemRecord
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.errors import Overloaded
from afmrl_ray.serving.models import Embedding, EncoderInput
from afmrl_ray.serving.records import EmbeddedItem, State, StoredItem
from afmrl_ray.serving.round_index import Filters, Hit
from afmrl_ray.serving.uploads import Upload

_ATTEMPTS = 5
_BACKOFF_S = 0.3


class _Port:
    """A deployment's handle.

    Args:
        handle: of the deployment.
        name: for messages.
    """

    def __init__(self, handle: DeploymentHandle, name: str) -> None:
        self._handle, self._name = handle, name

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call a replica, and another one where it dies.

        Raises:
            Overloaded: all queues are full, or no replica stays alive.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except BackPressureError as error:
                raise Overloaded(f"the queues of the {self._name} are full") from error
            except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError):
                await asyncio.sleep(_BACKOFF_S * 2**attempt)
        raise Overloaded(f"the replicas of the {self._name} are being restarted", retry_after_s=5)

    async def prepare(self, bundle: Bundle) -> None:
        """Load a bundle in every replica; one that starts meanwhile loads it at its first request."""
        await self._handle.broadcast("prepare", bundle).results_async(return_exceptions=False)


class HandleEncoder(_Port):
    """See `ports.EncoderPort`."""

    async def embed(self, bundle: Bundle, inputs: Sequence[EncoderInput]) -> list[Embedding]:
        return await self._call("embed", bundle, inputs)


class HandleGenerator(_Port):
    """See `ports.GeneratorPort`."""

    async def write(self, bundle: Bundle, upload: Upload) -> tuple[str, str]:
        return await self._call("write", bundle, upload)


class HandleIndex(_Port):
    """See `ports.IndexPort`."""

    async def state(self) -> State:
        return await self._call("state")

    async def search(self, key: str, vector: np.ndarray, k: int, filters: Filters) -> list[Hit] | None:
        return await self._call("search", key, vector, k, filters)

    async def upsert(self, item: StoredItem, embedded: dict[str, EmbeddedItem]) -> dict[str, Bundle] | None:
        return await self._call("upsert", item, embedded)

    async def delete(self, item_id: str) -> bool:
        return await self._call("delete", item_id)

    async def get(self, item_id: str) -> ItemRecord | None:
        return await self._call("get", item_id)

    async def size(self) -> int:
        return await self._call("size")

    async def begin_switch(self, bundle: Bundle) -> None:
        await self._call("begin_switch", bundle)

    async def without_vector(self, key: str, limit: int) -> list[StoredItem]:
        return await self._call("without_vector", key, limit)

    async def add_vector(self, item: StoredItem, key: str, embedded: EmbeddedItem) -> None:
        await self._call("add_vector", item, key, embedded)

    async def finish_switch(self, key: str) -> bool:
        return await self._call("finish_switch", key)
