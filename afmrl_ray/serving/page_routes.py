"""The search page and its files."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Response

from afmrl_ray.serving.errors import Problem

_MEDIA_TYPES = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """`/` and `/page/{name}`."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def index_page() -> Response:
        return _file("index.html")

    @routes.get("/page/{name}")
    async def page_file(name: str) -> Response:
        return _file(name)

    return routes


def _file(name: str) -> Response:
    if name not in _MEDIA_TYPES:
        raise Problem(404, f"the page has no file {name[:100]!r}")
    data = resources.files("afmrl_ray.serving").joinpath("page", name).read_bytes()
    return Response(data, media_type=_MEDIA_TYPES[name], headers=_HEADERS)
