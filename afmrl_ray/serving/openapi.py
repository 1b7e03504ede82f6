"""The OpenAPI document: what FastAPI derives from the routes, and what it cannot derive."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from afmrl_ray.serving.schemas import FiltersBody, SearchBody


def search_bodies() -> dict[str, Any]:
    """Both request bodies of a search, whose route parses them itself."""
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
    """FastAPI's schema, with the bodies of a search and the error responses of every route."""
    if api.openapi_schema is None:
        found = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        schemas = found["components"]["schemas"]
        for model in (SearchBody, FiltersBody):
            own = model.model_json_schema(ref_template="#/components/schemas/{model}")
            own.pop("$defs", None)
            schemas[model.__name__] = own
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        errors = {
            str(status): {"description": text, "content": {"application/problem+json": {"schema": {"type": "object"}}}}
            for status, text in _ERRORS.items()
        }
        for operations in found["paths"].values():
            for operation in operations.values():
                operation["responses"] = {**errors, **operation["responses"], "422": errors["422"]}
        api.openapi_schema = found
    return api.openapi_schema


_ERRORS = {
    400: "The body is malformed.",
    401: "The API key is missing or unknown.",
    403: "The key's role does not permit this.",
    404: "Not found.",
    409: "A switch is under way, or the round cannot be served.",
    413: "The body is too large.",
    415: "The content type is not supported.",
    422: "The request is invalid.",
    503: "Overloaded; repeat the request after Retry-After seconds.",
}
