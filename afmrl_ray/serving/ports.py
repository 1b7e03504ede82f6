"""The ports of `service.SearchService` as handles of deployments; every call may be made twice without harm."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from afmrl_ray.cit.stages.index import ItemRecord
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.errors import Overloaded
from afmrl_ray.serving.models import Embedding, EncoderInput
from afmrl_ray.serving.round_index import Filters, Hit
from afmrl_ray.serving.store import Embedded, State, StoredItem
from afmrl_ray.serving.uploads import Upload

_ATTEMPTS = 5
_PAUSE_S = 0.3


class _Port:
    """A deployment's handle.

    Args:
        handle: of the deployment.
        name: for messages.
    """

    def __init__(self, handle: DeploymentHandle, name: str) -> None:
        self._handle, self._name = handle, name

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Call a replica; one that dies is given up for another.

        Raises:
            Busy: all queues are full, or no replica lives for long.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except BackPressureError as error:
                raise Overloaded(f"the {self._name}'s queues are full") from error
            except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError):
                await asyncio.sleep(_PAUSE_S * 2**attempt)
        raise Overloaded(f"the {self._name}'s replicas are being started again", retry_after_s=5)

    async def prepare(self, bundle: Bundle) -> None:
        """Have a bundle at hand in every replica; a replica that is started meanwhile loads it when it is asked."""
        await self._handle.broadcast("prepare", bundle).results_async(return_exceptions=False)


class HandleEncoder(_Port):
    """See `service.EncoderPort`."""

    async def embed(self, bundle: Bundle, given: Sequence[EncoderInput]) -> list[Embedding]:
        return await self._ask("embed", bundle, given)


class HandleGenerator(_Port):
    """See `service.GeneratorPort`."""

    async def write(self, bundle: Bundle, upload: Upload) -> tuple[str, str]:
        return await self._ask("write", bundle, upload)


class HandleIndex(_Port):
    """See `service.IndexPort`."""

    async def state(self) -> State:
        return await self._ask("state")

    async def search(self, key: str, vector: np.ndarray, k: int, filters: Filters) -> list[Hit] | None:
        return await self._ask("search", key, vector, k, filters)

    async def upsert(self, item: StoredItem, embedded: dict[str, Embedded]) -> dict[str, Bundle] | None:
        return await self._ask("upsert", item, embedded)

    async def delete(self, item_id: str) -> bool:
        return await self._ask("delete", item_id)

    async def get(self, item_id: str) -> ItemRecord | None:
        return await self._ask("get", item_id)

    async def size(self) -> int:
        return await self._ask("size")

    async def begin_switch(self, bundle: Bundle) -> None:
        await self._ask("begin_switch", bundle)

    async def lacking(self, key: str, limit: int) -> list[StoredItem]:
        return await self._ask("lacking", key, limit)

    async def add_vector(self, item: StoredItem, key: str, embedded: Embedded) -> None:
        await self._ask("add_vector", item, key, embedded)

    async def finish_switch(self, key: str) -> bool:
        return await self._ask("finish_switch", key)
