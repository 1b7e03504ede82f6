"""The routes that any caller may use on items of a request: search, attributes and embeddings."""

from __future__ import annotations

import asyncio
import base64
import time

import numpy as np
from fastapi import APIRouter, Request

from afmrl_ray.serving.api_context import ApiContext, attribute_pairs, attributes_used, thumbnail_path
from afmrl_ray.serving.errors import Problem
from afmrl_ray.serving.models import Embedding, EncoderInput
from afmrl_ray.serving.openapi import search_bodies
from afmrl_ray.serving.round_index import Hit
from afmrl_ray.serving.schemas import (
    AttributesAnswer,
    EmbeddingBody,
    EmbeddingsAnswer,
    EmbeddingsBody,
    HitBody,
    ItemContent,
    ItemInput,
    ModelCard,
    ModelsAnswer,
    SearchAnswer,
    Usage,
)
from afmrl_ray.serving.search_body import parse_search

MODEL = "afmrl"


def search_routes(context: ApiContext) -> APIRouter:
    """`/v1/search`, `/v1/attributes`, `/v1/models` and `/v1/embeddings`."""
    routes = APIRouter(dependencies=context.user)
    service, limits, started = context.service, context.limits, int(time.time())

    @routes.post("/v1/search", openapi_extra=search_bodies())
    async def search(request: Request) -> SearchAnswer:
        """Choose attributes, embed and search: JSON, or a form with the image as a file."""
        body, upload = await parse_search(request, limits)
        source, given = context.attributes_of(body)
        filters, k = limits.filters(body.filters), limits.k(body.k)
        found = await context.within_deadline(
            service.search(upload, k=k, filters=filters, attributes_source=source, given=given)
        )
        context.metrics.round(found.bundle.round)
        return SearchAnswer(
            **attributes_used(found.attributes),
            hits=[_hit_body(hit) for hit in found.hits],
            round=found.bundle.round,
            bundle=found.bundle.key,
            milliseconds=found.milliseconds,
        )

    @routes.post("/v1/attributes")
    async def attributes(body: ItemContent) -> AttributesAnswer:
        """The attributes that the generator writes for an item."""
        upload = await asyncio.to_thread(limits.upload, body)
        bundle = await context.within_deadline(service.current())
        result = await context.within_deadline(service.attributes(bundle, upload))
        return AttributesAnswer(**attributes_used(result), round=bundle.round, bundle=bundle.key)

    async def model_cards() -> list[ModelCard]:
        bundle = await context.within_deadline(service.current())
        return [ModelCard(id=name, created=started) for name in (MODEL, bundle.key)]

    @routes.get("/v1/models")
    async def models() -> ModelsAnswer:
        """The models that requests may name: the current one, and the same by the key of its bundle."""
        return ModelsAnswer(data=await model_cards())

    @routes.get("/v1/models/{model}")
    async def model(model: str) -> ModelCard:
        """One of the models."""
        for card in await model_cards():
            if card.id == model:
                return card
        raise Problem(404, f"model {model[:200]!r} is not served")

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsBody) -> EmbeddingsAnswer:
        """Embeddings in the shape of OpenAI's API; inputs may be items with images."""
        inputs = body.input if isinstance(body.input, list) else [body.input]
        limits.batch(len(inputs))
        bundle = await context.within_deadline(service.current())
        if body.model not in (MODEL, bundle.key):
            raise Problem(404, f"model: {MODEL!r} or {bundle.key!r}")
        if body.dimensions is not None and body.dimensions != bundle.dimensions:
            raise Problem(422, f"dimensions: the model has {bundle.dimensions}")

        async def encoder_input(position: int, given: str | ItemInput) -> EncoderInput:
            item = ItemInput(title=given) if isinstance(given, str) else given
            upload = await asyncio.to_thread(limits.upload, item, f"input[{position}].")
            source, text = context.attributes_of(item)
            return EncoderInput(upload, (await service.attributes_for(bundle, upload, source, text)).text)

        async def embed() -> list[Embedding]:
            return await service.embed(bundle, await asyncio.gather(*map(encoder_input, range(len(inputs)), inputs)))

        found = await context.within_deadline(embed())
        tokens = sum(each.tokens for each in found)
        data = [
            EmbeddingBody(index=position, embedding=_encoded(each.vector, body.encoding_format))
            for position, each in enumerate(found)
        ]
        return EmbeddingsAnswer(data=data, model=MODEL, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))

    return routes


def _hit_body(hit: Hit) -> HitBody:
    return HitBody(
        item_id=hit.item_id,
        score=round(hit.score, 6),
        title=hit.title,
        category=hit.category,
        product_id=hit.product_id,
        attributes=attribute_pairs(hit.attributes),
        thumbnail=thumbnail_path(hit.item_id),
    )


def _encoded(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
