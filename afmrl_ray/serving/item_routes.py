"""The routes of items that can be found: upsert, get, thumbnail, delete."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from afmrl_ray.serving.api_context import ApiContext, attribute_pairs, attributes_used, thumbnail_path
from afmrl_ray.serving.errors import Problem
from afmrl_ray.serving.records import StoredItem
from afmrl_ray.serving.schemas import MAX_ITEM_ID, ItemAnswer, ItemBody

ItemId = Annotated[str, Path(min_length=1, max_length=MAX_ITEM_ID)]
"""An id of any text, percent-encoded in the path; one with a slash too."""


def item_routes(context: ApiContext) -> APIRouter:
    """`/v1/items`; changing items needs a key of role admin."""
    routes = APIRouter()
    service, limits = context.service, context.limits

    @routes.post("/v1/items", dependencies=context.admin)
    async def upsert_item(body: ItemBody) -> ItemAnswer:
        """Insert an item, or replace the one of the same id; it is durable and found by searches when this returns."""
        upload = await asyncio.to_thread(limits.upload, body)
        for name in ("item_id", "category", "product_id"):
            limits.text(getattr(body, name) or "", name)
        given = limits.attribute_text(body.attributes, "attributes") if body.attributes is not None else None
        small = await asyncio.to_thread(context.thumbnail, upload.image) if upload.image is not None else None
        item = StoredItem(body.item_id, upload.title, body.category, body.product_id, given, upload.image, small)
        result = await context.within_deadline(service.upsert(item))
        return ItemAnswer(
            **attributes_used(result),
            item_id=item.item_id,
            title=item.title,
            category=item.category,
            product_id=item.product_id,
            thumbnail=thumbnail_path(item.item_id),
        )

    @routes.get("/v1/items/{item_id:path}/thumbnail", dependencies=context.user, response_class=Response)
    async def get_thumbnail(item_id: ItemId, request: Request) -> Response:
        """A small JPEG of an item's image."""
        if _is_of_id(request, b"/thumbnail"):
            return JSONResponse((await get_item(f"{item_id}/thumbnail")).model_dump())
        record = await context.within_deadline(service.get(item_id))
        if record is None or record.thumbnail is None:
            raise _not_found(item_id)
        return Response(record.thumbnail, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})

    @routes.get("/v1/items/{item_id:path}", dependencies=context.user)
    async def get_item(item_id: ItemId) -> ItemAnswer:
        """An item as searches see it."""
        record = await context.within_deadline(service.get(item_id))
        if record is None:
            raise _not_found(item_id)
        return ItemAnswer(
            item_id=item_id,
            title=record.title,
            category=record.category,
            product_id=record.product_id,
            attributes=attribute_pairs(record.attributes),
            attributes_source="generated" if record.attributes else "none",
            thumbnail=thumbnail_path(item_id),
        )

    @routes.delete("/v1/items/{item_id:path}", dependencies=context.admin, status_code=204)
    async def delete_item(item_id: ItemId) -> None:
        """Delete an item, whether it was upserted or came with the index."""
        if not await context.within_deadline(service.delete(item_id)):
            raise _not_found(item_id)

    return routes


def _is_of_id(request: Request, ending: bytes) -> bool:
    """Whether the ending of the path belongs to an id: its slash is percent-encoded."""
    raw: bytes = request.scope.get("raw_path", b"").partition(b"?")[0]
    return bool(raw) and not raw.endswith(ending)


def _not_found(item_id: str) -> Problem:
    return Problem(404, f"item {item_id[:200]!r} does not exist, or has no image")
