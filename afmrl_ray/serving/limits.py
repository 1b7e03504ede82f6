"""Limits of requests: sizes are checked before any work is done."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from afmrl_ray.attributes.text import Attributes, format_attributes, normalise_attributes
from afmrl_ray.config.serving import LimitsConfig
from afmrl_ray.serving.errors import MEDIA_TYPE, Problem
from afmrl_ray.serving.round_index import Filters
from afmrl_ray.serving.schemas import FiltersBody, ItemContent
from afmrl_ray.serving.uploads import Upload, upload_fault

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class BodyLimit:
    """ASGI middleware that answers 413 to bodies above a size, counted while they are received.

    Args:
        app: the application behind it.
        most: bytes.
    """

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._most:
            await self._refuse(send)
            return
        received, answered = 0, False

        async def limited() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                raise _TooLarge
            return message

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, limited, sending)
        except _TooLarge:
            if not answered:
                await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        body = json.dumps(
            {
                "type": "about:blank",
                "title": "Content Too Large",
                "status": 413,
                "detail": f"the body has more than {self._most} bytes (limits.body_mb)",
            }
        ).encode()
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 413, "headers": [*headers, (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})


class _TooLarge(BaseException):
    """A BaseException, so that no error handler of the application answers it."""


@dataclass(frozen=True)
class Limits:
    """Checks requests against a deployment's limits; each check raises Problem 422 and names the field."""

    config: LimitsConfig

    def upload(self, body: ItemContent, where: str = "") -> Upload:
        """The item of a body; takes long, since the image is decoded."""
        title = " ".join(self.text(body.title, f"{where}title").split())
        image = self.image(body.image, f"{where}image") if body.image is not None else None
        return self.item(title, image, where)

    def item(self, title: str, image: bytes | None, where: str = "") -> Upload:
        """An item, which must have an image or a title."""
        if not title and image is None:
            raise Problem(422, f"{where}image and title are both missing; send at least one")
        return Upload(title, image)

    def text(self, text: str, field: str) -> str:
        """A text, such as a title."""
        if len(text) > self.config.title_characters:
            raise Problem(422, f"{field}: longer than {self.config.title_characters} characters")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise Problem(422, f"{field}: contains a lone surrogate")
        return text

    def image(self, encoded: str, field: str) -> bytes:
        """The image of base64 text or a data URL."""
        if encoded.startswith("data:"):
            encoded = encoded.partition(",")[2]
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Problem(422, f"{field}: is not base64") from error
        return self.image_bytes(data, field)

    def image_bytes(self, data: bytes, field: str) -> bytes:
        """An encoded image."""
        fault = upload_fault(data, self.config.image_pixels)
        if fault is not None:
            raise Problem(422, f"{field}: {fault}")
        return data

    def attributes(self, given: dict[str, str] | None, field: str) -> Attributes:
        """Attributes in normal form."""
        if given is not None and len(given) > self.config.attributes:
            raise Problem(422, f"{field}: more than {self.config.attributes} pairs")
        for name, value in (given or {}).items():
            self.text(name, field)
            self.text(value, field)
        return normalise_attributes(given or {})

    def attribute_text(self, given: dict[str, str] | None, field: str) -> str:
        """Attributes as canonical text."""
        return format_attributes(self.attributes(given, field))

    def filters(self, body: FiltersBody) -> Filters:
        """Filters in the normal form that the index compares."""
        category = self.text(body.category, "filters.category") if body.category is not None else None
        return Filters(category, self.attributes(body.attributes, "filters.attributes"))

    def k(self, k: int) -> int:
        """Number of hits of a search."""
        if k > self.config.k:
            raise Problem(422, f"k: at most {self.config.k}")
        return k

    def batch(self, count: int) -> None:
        """Number of inputs of a request."""
        if not 1 <= count <= self.config.batch:
            raise Problem(422, f"input: 1 to {self.config.batch} texts or items")
