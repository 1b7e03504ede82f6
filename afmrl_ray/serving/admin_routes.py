"""The routes of the deployment itself: what is served, switching the round, health and metrics."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter, Response

from afmrl_ray.errors import UserError
from afmrl_ray.serving.api_context import ApiContext
from afmrl_ray.serving.errors import Overloaded, Problem
from afmrl_ray.serving.schemas import ModelAnswer, SwitchAnswer, SwitchBody

_HEALTH_TIMEOUT_S = 5


def admin_routes(context: ApiContext) -> APIRouter:
    """`/v1/model`, `/admin/switch`, `/healthz` and `/metrics`."""
    routes = APIRouter()
    service, metrics = context.service, context.metrics

    @routes.get("/v1/model", dependencies=context.user)
    async def model() -> ModelAnswer:
        """What is served."""
        state, items = await context.within_deadline(asyncio.gather(service.state(), service.size()))
        current, target = state.current, state.switching_to
        metrics.round(current.round)
        return ModelAnswer(
            round=current.round,
            bundle=current.key,
            switching_to=target.key if target is not None else None,
            history=[bundle.key for bundle in state.history],
            fingerprints=current.fingerprints,
            metrics=current.metrics,
            dimensions=current.dimensions,
            items=items,
            limits=context.config.limits.model_dump(),
            attributes_source=context.config.attributes_source,
        )

    @routes.post("/admin/switch", dependencies=context.admin)
    async def switch(body: SwitchBody) -> SwitchAnswer:
        """Switch to another round, or back, without a failed request; returns when it is served."""
        try:
            bundle = await asyncio.to_thread(context.open_round, body.round)
        except UserError as error:
            raise Problem(409, str(error)) from error
        result = await service.switch(bundle)
        metrics.round(bundle.round)
        return SwitchAnswer(**asdict(result))

    @routes.get("/healthz", response_class=Response)
    async def healthz() -> Response:
        """Whether requests can be answered."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await service.state()
        except TimeoutError as error:
            raise Overloaded("the index does not answer") from error
        return Response("ok", media_type="text/plain")

    @routes.get("/metrics", dependencies=context.user, response_class=Response)
    async def prometheus() -> Response:
        """Metrics of the replica that answers."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return routes
