"""What all routes of the API share: service, limits, authentication and deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from fastapi import Depends, Request

from afmrl_ray.attributes.text import stored_attributes
from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.errors import Overloaded, Problem
from afmrl_ray.serving.limits import Limits
from afmrl_ray.serving.metrics import ServingMetrics
from afmrl_ray.serving.schemas import AttributesSource, AttributesUsed, ItemInput, SearchBody
from afmrl_ray.serving.security import Caller, Keys
from afmrl_ray.serving.service import AttributeResult, SearchService

Answer = TypeVar("Answer")
_TIMEOUT_RETRY_S = 5


@dataclass(frozen=True)
class ApiContext:
    """What the routes work with.

    Attributes:
        service: the application's logic.
        config: of the deployment.
        keys: API keys.
        metrics: of this replica.
        open_round: the bundle of a round, or of the best one; see `bundle.open_bundle`.
        thumbnail: small JPEG of an encoded image.
    """

    service: SearchService
    config: ServingConfig
    keys: Keys
    metrics: ServingMetrics
    open_round: Callable[[int | None], Bundle]
    thumbnail: Callable[[bytes], bytes]

    @property
    def limits(self) -> Limits:
        """Checks of the deployment's limits."""
        return Limits(self.config.limits)

    @property
    def user(self) -> list[Any]:
        """Dependencies of a route that any caller with a key may use."""
        return [Depends(self.caller)]

    @property
    def admin(self) -> list[Any]:
        """Dependencies of a route that only administrators may use."""
        return [Depends(self.administrator)]

    async def caller(self, request: Request) -> Caller:
        """Who sent a request; see `Keys.caller`."""
        host = request.client.host if request.client is not None else None
        return self.keys.caller(request.headers.get("authorization"), host)

    async def administrator(self, request: Request) -> Caller:
        """The same, if it is an administrator.

        Raises:
            Problem: 401 or 403.
        """
        caller = await self.caller(request)
        if not caller.admin:
            raise Problem(403, "this needs a key of role admin")
        return caller

    async def within_deadline(self, work: Awaitable[Answer]) -> Answer:
        """Await work for at most `limits.request_s`.

        Raises:
            Overloaded: it takes longer.
        """
        seconds = self.config.limits.request_s
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError as error:
            raise Overloaded(f"no answer within {seconds:g} s (limits.request_s)", _TIMEOUT_RETRY_S) from error

    def attributes_of(self, body: SearchBody | ItemInput) -> tuple[AttributesSource, str]:
        """Source of a request's attributes, and the canonical text of given ones.

        Raises:
            Problem: 422, the attributes exceed a limit, or are missing where the source is `given`.
        """
        given = self.limits.attribute_text(body.attributes, "attributes")
        # An embedding is of what the request holds; a search has the deployment's default.
        otherwise = self.config.attributes_source if isinstance(body, SearchBody) else "none"
        default = "given" if body.attributes is not None else otherwise
        source = body.attributes_source or default
        if source == "given" and body.attributes is None:
            raise Problem(422, "attributes: missing, though attributes_source is given")
        return source, given


def attributes_used(result: AttributeResult) -> dict[str, Any]:
    """The fields of `AttributesUsed`."""
    return AttributesUsed(
        attributes=attribute_pairs(result.text),
        attributes_source=result.source,
        reason=result.reason or None,
        cached=result.cached,
    ).model_dump()


def attribute_pairs(text: str) -> dict[str, str]:
    """Canonical attribute text as an object."""
    return dict(stored_attributes(text))


def thumbnail_path(item_id: str) -> str:
    """Path of an item's thumbnail."""
    return f"/v1/items/{quote(item_id, safe='')}/thumbnail"
