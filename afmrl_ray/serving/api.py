"""The HTTP API: the routes, their error responses and the middleware around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.serving.admin_routes import admin_routes
from afmrl_ray.serving.api_context import ApiContext
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.errors import handle_errors
from afmrl_ray.serving.item_routes import item_routes
from afmrl_ray.serving.limits import BodyLimit
from afmrl_ray.serving.metrics import Observed, ServingMetrics
from afmrl_ray.serving.openapi import openapi
from afmrl_ray.serving.page_routes import page_routes
from afmrl_ray.serving.search_routes import search_routes
from afmrl_ray.serving.security import Keys
from afmrl_ray.serving.service import SearchService


def make_api(
    service: SearchService,
    config: ServingConfig,
    keys: Keys,
    metrics: ServingMetrics,
    open_round: Callable[[int | None], Bundle],
    thumbnail: Callable[[bytes], bytes],
) -> Any:
    """The ASGI application; see `api_context.ApiContext` for the arguments."""
    context = ApiContext(service, config, keys, metrics, open_round, thumbnail)
    api = FastAPI(title="afmrl_ray", version="1", description="Attributes, embeddings and search of product items.")
    for routes in (search_routes(context), item_routes(context), admin_routes(context), page_routes()):
        api.include_router(routes)
    handle_errors(api)
    api.openapi = lambda: openapi(api)  # type: ignore[method-assign]
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return Observed(BodyLimit(api, int(config.limits.body_mb * 2**20)), metrics)
