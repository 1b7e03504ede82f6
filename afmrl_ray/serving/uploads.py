"""Items of requests: checked before they are decoded, and read by the models as rows of a catalogue."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from afmrl_ray.catalogue.checks import image_fault
from afmrl_ray.catalogue.images import decode_image

FORMATS = ("JPEG", "PNG", "WEBP")

_FAULTS = {
    "decompression_bomb": "has more pixels than limits.image_pixels allows",
    "aspect_ratio": "is longer than 200 times its width",
    "undecodable_image": "is damaged or cut off",
}


@dataclass(frozen=True)
class Upload:
    """An item of a request.

    Attributes:
        title: the seller's text; empty = none.
        image: encoded; None = none.
    """

    title: str = ""
    image: bytes | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of title and image, hexadecimal."""
        total = hashlib.sha256(self.title.encode("utf-8", "surrogatepass"))
        total.update(b"\0" if self.image is None else b"\1" + self.image)
        return total.hexdigest()


class Uploads:
    """Uploads as `models.prompts.ItemReader`; a row is a position."""

    def __init__(self, uploads: Sequence[Upload]) -> None:
        self._uploads = uploads

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of an upload that has one."""
        data = self._uploads[row].image
        assert data is not None, "the caller asks for images of uploads that have one"
        return data

    def image(self, row: int) -> Image.Image:
        """The decoded image, RGB, see `decode_image`."""
        return decode_image(self.image_bytes(row), formats=FORMATS)

    def title(self, row: int, columns: tuple[str, ...] = ("title",)) -> str:
        """The title; uploads have no columns to choose from."""
        return self._uploads[row].title


def upload_fault(data: bytes, max_pixels: int) -> str | None:
    """Why encoded bytes are refused as an image; None = they are not. The size is read from the image's header."""
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except Image.DecompressionBombError:
        return f"the image {_FAULTS['decompression_bomb']}"
    except Exception:  # noqa: BLE001 - damaged headers make Pillow's decoders raise anything
        return "the image is not a JPEG, PNG or WebP"
    fault = image_fault(data, max_pixels)
    return f"the image {_FAULTS.get(fault, fault)}" if fault else None
