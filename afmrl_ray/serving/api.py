"""The HTTP API: what comes in is checked here, what it means is `service.SearchService`'s."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from afmrl_ray.attributes.text import stored_attributes
from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.errors import UserError
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.errors import Overloaded, Problem, problem_response
from afmrl_ray.serving.limits import BodyLimit, Limits
from afmrl_ray.serving.metrics import Observed, ServingMetrics
from afmrl_ray.serving.models import Embedding, EncoderInput
from afmrl_ray.serving.openapi import openapi, search_bodies
from afmrl_ray.serving.schemas import (
    AttributesAnswer,
    AttributesUsed,
    EmbeddingBody,
    EmbeddingsAnswer,
    EmbeddingsBody,
    HitBody,
    ItemAnswer,
    ItemBody,
    ItemContent,
    ItemInput,
    ModelAnswer,
    RolloverAnswer,
    RolloverBody,
    SearchAnswer,
    SearchBody,
    Usage,
)
from afmrl_ray.serving.security import Caller, Keys
from afmrl_ray.serving.service import AttributeResult, SearchService
from afmrl_ray.serving.store import StoredItem
from afmrl_ray.serving.uploads import Upload

Answer = TypeVar("Answer")
MODEL = "afmrl"
_HEALTH_S = 5
_PAGE = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FORM_FIELDS = ("title", "k", "attributes_source", "attributes", "filters")
ItemId = Annotated[str, Path(max_length=200)]


def make_api(
    service: SearchService,
    config: ServingConfig,
    keys: Keys,
    metrics: ServingMetrics,
    open_round: Callable[[int | None], Bundle],
    thumbnail: Callable[[bytes], bytes],
) -> Any:
    """The ASGI application.

    Args:
        service: does the work.
        config: limits, and what a search does by default.
        keys: who may ask.
        metrics: of this replica.
        open_round: the bundle of a round, see `bundle.open_bundle`.
        thumbnail: small JPEG of an encoded image.
    """
    limits = Limits(config.limits)
    api = FastAPI(title="afmrl_ray", version="1", description="Attributes, embeddings and search of product items.")

    async def caller(request: Request) -> Caller:
        host = request.client.host if request.client is not None else None
        return keys.caller(request.headers.get("authorization"), host)

    async def administrator(request: Request) -> Caller:
        who = await caller(request)
        if not who.admin:
            raise Problem(403, "this needs a key of role admin")
        return who

    async def bounded(work: Awaitable[Answer]) -> Answer:
        try:
            async with asyncio.timeout(config.limits.request_s):
                return await work
        except TimeoutError as error:
            raise Overloaded(f"no answer within {config.limits.request_s:g} s (limits.request_s)", 5) from error

    def attributes_of(body: SearchBody | ItemInput) -> tuple[Any, str]:
        given = limits.attribute_text(body.attributes, "attributes")
        attributes_source = body.attributes_source or (
            "given" if body.attributes is not None else config.attributes_source
        )
        if attributes_source == "given" and body.attributes is None:
            raise Problem(422, "attributes: missing, though show with attributes is given")
        return attributes_source, given

    user, admin = [Depends(caller)], [Depends(administrator)]

    @api.post("/v1/search", dependencies=user, openapi_extra=search_bodies())
    async def search(request: Request) -> SearchAnswer:
        """Choose attributes, embed and search: JSON, or a form with the image as a file."""
        body, image = await _search_body(request, limits)
        upload = (
            await asyncio.to_thread(limits.upload, body)
            if image is None
            else (await asyncio.to_thread(_uploaded, limits, body, image))
        )
        (attributes_source, given), filters, k = attributes_of(body), limits.filters(body.filters), limits.k(body.k)
        found = await bounded(
            service.search(upload, k=k, filters=filters, attributes_source=attributes_source, given=given)
        )
        metrics.round(found.bundle.round)
        hits = [
            HitBody(
                item_id=hit.item_id,
                score=round(hit.score, 6),
                title=hit.title,
                category=hit.category,
                product_id=hit.product_id,
                attributes=_pairs(hit.attributes),
                thumbnail=_thumbnail_address(hit.item_id),
            )
            for hit in found.hits
        ]
        return SearchAnswer(
            **_used(found.attributes),
            hits=hits,
            round=found.bundle.round,
            bundle=found.bundle.key,
            milliseconds=found.milliseconds,
        )

    @api.post("/v1/attributes", dependencies=user)
    async def attributes(body: ItemContent) -> AttributesAnswer:
        """What the generator writes of an item."""
        upload = await asyncio.to_thread(limits.upload, body)
        bundle = await bounded(service.current())
        written = await bounded(service.attributes(bundle, upload))
        return AttributesAnswer(**_used(written), round=bundle.round, bundle=bundle.key)

    @api.post("/v1/embeddings", dependencies=user)
    async def embeddings(body: EmbeddingsBody) -> EmbeddingsAnswer:
        """Embeddings in the shape of OpenAI's API; inputs may be items with images."""
        inputs = body.input if isinstance(body.input, list) else [body.input]
        limits.batch(len(inputs))
        bundle = await bounded(service.current())
        if body.model not in (MODEL, bundle.key):
            raise Problem(404, f"model: {MODEL!r} or {bundle.key!r}")
        if body.dimensions is not None and body.dimensions != bundle.dimensions:
            raise Problem(422, f"dimensions: the model gives {bundle.dimensions}")

        async def one(place: int, given: str | ItemInput) -> EncoderInput:
            item = ItemInput(title=given) if isinstance(given, str) else given
            upload = await asyncio.to_thread(limits.upload, item, f"input[{place}].")
            attributes_source, text = attributes_of(item)
            return EncoderInput(upload, (await service.attributes_for(bundle, upload, attributes_source, text)).text)

        async def all_of_them() -> list[Embedding]:
            return await service.embed(bundle, await asyncio.gather(*map(one, range(len(inputs)), inputs)))

        found = await bounded(all_of_them())
        tokens = sum(each.tokens for each in found)
        data = [
            EmbeddingBody(index=place, embedding=_encoded(each.vector, body.encoding_format))
            for place, each in enumerate(found)
        ]
        return EmbeddingsAnswer(data=data, model=MODEL, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))

    @api.post("/v1/items", dependencies=admin)
    async def put_item(body: ItemBody) -> ItemAnswer:
        """Put an item in; it is on disk and found by searches when this returns."""
        upload = await asyncio.to_thread(limits.upload, body)
        for name in ("category", "product_id"):
            limits.text(getattr(body, name) or "", name)
        given = limits.attribute_text(body.attributes, "attributes") if body.attributes is not None else None
        small = await asyncio.to_thread(thumbnail, upload.image) if upload.image is not None else None
        item = StoredItem(body.item_id, upload.title, body.category, body.product_id, given, upload.image, small)
        _, written = await bounded(service.upsert(item))
        return ItemAnswer(
            **_used(written),
            item_id=item.item_id,
            title=item.title,
            category=item.category,
            product_id=item.product_id,
            thumbnail=_thumbnail_address(item.item_id),
        )

    @api.get("/v1/items/{item_id}", dependencies=user)
    async def get_item(item_id: ItemId) -> ItemAnswer:
        """An item as it is searched."""
        record = await bounded(service.get(item_id))
        if record is None:
            raise _no_item(item_id)
        return ItemAnswer(
            item_id=item_id,
            title=record.title,
            category=record.category,
            product_id=record.product_id,
            attributes=_pairs(record.attributes),
            attributes_source="generated" if record.attributes else "none",
            thumbnail=_thumbnail_address(item_id),
        )

    @api.get("/v1/items/{item_id}/thumbnail", dependencies=user, response_class=Response)
    async def get_thumbnail(item_id: ItemId) -> Response:
        """An item's image, small."""
        record = await bounded(service.get(item_id))
        if record is None or record.thumbnail is None:
            raise _no_item(item_id)
        return Response(record.thumbnail, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})

    @api.delete("/v1/items/{item_id}", dependencies=admin, status_code=204)
    async def delete_item(item_id: ItemId) -> None:
        """Take an item out, whether it was put in or came with the index."""
        if not await bounded(service.delete(item_id)):
            raise _no_item(item_id)

    @api.get("/v1/model", dependencies=user)
    async def model() -> ModelAnswer:
        """What is served."""
        state, items = await bounded(asyncio.gather(service.state(), service.size()))
        metrics.round(state.current.round)
        return ModelAnswer(
            round=state.current.round,
            bundle=state.current.key,
            rolling=state.rolling.key if state.rolling is not None else None,
            history=[bundle.key for bundle in state.history],
            fingerprints=state.current.fingerprints,
            metrics=state.current.metrics,
            dimensions=state.current.dimensions,
            items=items,
            limits=config.limits.model_dump(),
            attributes_source=config.attributes_source,
        )

    @api.post("/admin/switch", dependencies=admin)
    async def switch(body: RolloverBody) -> RolloverAnswer:
        """Go over to another round, or back, without a failed request; returns when it is served."""
        try:
            bundle = await asyncio.to_thread(open_round, body.round)
        except UserError as error:
            raise Problem(409, str(error)) from error
        found = await service.switch(bundle)
        metrics.round(bundle.round)
        return RolloverAnswer(**found)

    @api.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        """Whether requests can be answered."""
        try:
            async with asyncio.timeout(_HEALTH_S):
                await service.state()
        except TimeoutError as error:
            raise Overloaded("the index does not answer") from error
        return Response("ok", media_type="text/plain")

    @api.get("/metrics", dependencies=user, response_class=Response)
    async def prometheus() -> Response:
        """Numbers of the replica that answers."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @api.get("/", include_in_schema=False)
    async def index_page() -> Response:
        return _page("index.html")

    @api.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return _page(name)

    _handle_errors(api)
    api.openapi = lambda: openapi(api)  # type: ignore[method-assign]
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return Observed(BodyLimit(api, int(config.limits.body_mb * 2**20)), metrics)


def _handle_errors(api: FastAPI) -> None:
    @api.exception_handler(Problem)
    async def refused(request: Request, error: Problem) -> Response:
        return problem_response(error.status, error.detail, error.headers)

    @api.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        return problem_response(error.status_code, str(error.detail), dict(error.headers or {}))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error.errors())

    @api.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return problem_response(500, "the server failed; its log says why")


def _invalid(errors: Any) -> Response:
    shown = [
        {"where": ".".join(str(part) for part in one["loc"])[:200], "what": one["msg"][:200]} for one in errors[:10]
    ]
    return problem_response(422, f"{shown[0]['where']}: {shown[0]['what']}" if shown else "invalid", errors=shown)


async def _search_body(request: Request, limits: Limits) -> tuple[SearchBody, bytes | None]:
    """The body of a search, and the image where it came as a file."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    image: bytes | None = None
    values: Any
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=len(_FORM_FIELDS) + 1) as form:
            sent = form.get("image")
            if isinstance(sent, UploadFile):
                image = await sent.read()
            elif sent:
                raise Problem(422, "image: send it as a file")
            unknown = sorted(set(form) - {"image", *_FORM_FIELDS})
            if unknown:
                raise Problem(422, f"unknown field {unknown[0][:100]!r}")
            values = {name: form[name] for name in _FORM_FIELDS if isinstance(form.get(name), str)}
        for name in ("attributes", "filters"):
            if name in values:
                values[name] = _json(values[name].encode(), name)
    elif kind in ("application/json", ""):
        values = _json(await request.body(), "body")
    else:
        raise Problem(415, "send application/json, or multipart/form-data with the image as a file")
    try:
        return SearchBody.model_validate(values), image
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False, include_context=False)) from error


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Problem(422, f"{where}: no valid JSON") from error


def _uploaded(limits: Limits, body: SearchBody, image: bytes) -> Upload:
    title = " ".join(limits.text(body.title, "title").split())
    return limits.item(title, limits.image_bytes(image, "image"))


def _used(written: AttributeResult) -> dict[str, Any]:
    return AttributesUsed(
        attributes=_pairs(written.text),
        attributes_source=written.source,
        reason=written.reason or None,
        cached=written.cached,
    ).model_dump()


def _pairs(text: str) -> dict[str, str]:
    return dict(stored_attributes(text))


def _encoded(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]


def _thumbnail_address(item_id: str) -> str:
    from urllib.parse import quote

    return f"/v1/items/{quote(item_id, safe='')}/thumbnail"


def _no_item(item_id: str) -> Problem:
    return Problem(404, f"there is no item {item_id[:200]!r}, or no image of it")


def _page(name: str) -> Response:
    if name not in _PAGE:
        raise Problem(404, "there is no such page")
    data = resources.files("afmrl_ray.serving").joinpath("page", name).read_bytes()
    return Response(data, media_type=_PAGE[name], headers=_PAGE_HEADERS)
