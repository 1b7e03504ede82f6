"""Parsing the body of a search, which may be JSON or a form with the image as a file."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from afmrl_ray.serving.errors import Problem
from afmrl_ray.serving.limits import Limits
from afmrl_ray.serving.schemas import SearchBody
from afmrl_ray.serving.uploads import Upload

_FORM_FIELDS = ("title", "k", "attributes_source", "attributes", "filters")
_JSON_FIELDS = ("attributes", "filters")


async def parse_search(request: Request, limits: Limits) -> tuple[SearchBody, Upload]:
    """The body of a search and its item.

    Raises:
        Problem: 415 for another content type; 422 for an invalid field.
        RequestValidationError: the body does not fit `SearchBody`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    image: bytes | None = None
    values: Any
    if kind == "multipart/form-data":
        values, image = await _form(request)
    elif kind in ("application/json", ""):
        values = _json(await request.body(), "body")
    else:
        raise Problem(415, "send application/json, or multipart/form-data with the image as a file")
    try:
        body = SearchBody.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False, include_context=False)) from error
    if image is None:
        return body, await asyncio.to_thread(limits.upload, body)
    return body, await asyncio.to_thread(_upload_of_file, limits, body, image)


async def _form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    image: bytes | None = None
    async with request.form(max_files=1, max_fields=len(_FORM_FIELDS) + 1) as form:
        sent = form.get("image")
        if isinstance(sent, UploadFile):
            image = await sent.read()
        elif sent:
            raise Problem(422, "image: send it as a file")
        unknown = sorted(set(form) - {"image", *_FORM_FIELDS})
        if unknown:
            raise Problem(422, f"unknown field {unknown[0][:100]!r}")
        values: dict[str, Any] = {name: form[name] for name in _FORM_FIELDS if isinstance(form.get(name), str)}
    for name in _JSON_FIELDS:
        if name in values:
            values[name] = _json(values[name].encode(), name)
    return values, image


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Problem(422, f"{where}: invalid JSON") from error


def _upload_of_file(limits: Limits, body: SearchBody, image: bytes) -> Upload:
    title = " ".join(limits.text(body.title, "title").split())
    return limits.item(title, limits.image_bytes(image, "image"))
