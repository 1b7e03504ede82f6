"""What the OpenAPI document says beyond what FastAPI sees."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from afmrl_ray.serving.schemas import FiltersBody, SearchBody


def search_bodies() -> dict[str, Any]:
    """Both bodies of a search, which its route reads itself."""
    form = {
        "type": "object",
        "properties": {
            "image": {"type": "string", "format": "binary", "description": "JPEG, PNG or WebP."},
            "title": {"type": "string"},
            "k": {"type": "integer", "minimum": 1},
            "attributes_source": {"type": "string", "enum": ["generated", "given", "none"]},
            "attributes": {"type": "string", "description": "A JSON object."},
            "filters": {"type": "string", "description": "A JSON object, as in the JSON body."},
        },
    }
    content = {
        "application/json": {"schema": {"$ref": "#/components/schemas/SearchBody"}},
        "multipart/form-data": {"schema": form},
    }
    return {"requestBody": {"required": True, "content": content}}


def openapi(api: FastAPI) -> dict[str, Any]:
    """FastAPI's schema, with the body that it does not see and the refusals that every route knows."""
    if api.openapi_schema is None:
        found = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        schemas = found["components"]["schemas"]
        for model in (SearchBody, FiltersBody):
            own = model.model_json_schema(ref_template="#/components/schemas/{model}")
            own.pop("$defs", None)
            schemas[model.__name__] = own
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        refusals = {
            str(status): {"description": text, "content": {"application/problem+json": {"schema": {"type": "object"}}}}
            for status, text in _REFUSALS.items()
        }
        for operations in found["paths"].values():
            for operation in operations.values():
                operation["responses"] = {**refusals, **operation["responses"], "422": refusals["422"]}
        api.openapi_schema = found
    return api.openapi_schema


_REFUSALS = {
    400: "The body cannot be read.",
    401: "No known API key.",
    403: "The key may not do this.",
    404: "There is no such thing.",
    409: "Not now.",
    413: "The body is too large.",
    415: "The body is of a kind that is not taken.",
    422: "The request does not fit.",
    503: "Ask again after Retry-After seconds.",
}
