"""Items that came with a request: checked before anything is decoded, shown to the models as a catalogue's."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from afmrl_ray.catalogue.checks import image_fault

FORMATS = ("JPEG", "PNG", "WEBP")

_WHY = {
    "decompression_bomb": "has more pixels than limits.image_pixels allows",
    "aspect_ratio": "is longer than 200 times its width",
    "undecodable_image": "is damaged or cut off",
}


@dataclass(frozen=True)
class Upload:
    """An item of a request.

    Attributes:
        title: the seller's text; empty = none.
        image: encoded image; none = there is none.
    """

    title: str = ""
    image: bytes | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of title and image."""
        total = hashlib.sha256(self.title.encode("utf-8", "surrogatepass"))
        total.update(b"\0" if self.image is None else b"\1" + self.image)
        return total.hexdigest()


class Uploads:
    """`models.prompts.ItemReader` over uploads."""

    def __init__(self, uploads: Sequence[Upload]) -> None:
        self._uploads = uploads

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of an upload that has one."""
        data = self._uploads[row].image
        assert data is not None, "the caller asks for images of uploads that have one"
        return data

    def image(self, row: int) -> Image.Image:
        """The decoded image, RGB."""
        with Image.open(io.BytesIO(self.image_bytes(row)), formats=FORMATS) as image:
            return image.convert("RGB")

    def title(self, row: int, columns: tuple[str, ...] = ("title",)) -> str:
        """The title, whatever columns a catalogue would take it from."""
        return self._uploads[row].title


def upload_fault(data: bytes, max_pixels: int) -> str | None:
    """Why encoded bytes are no image that is taken; the format is judged by the bytes, the size by the header."""
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except Image.DecompressionBombError:
        return f"the image {_WHY['decompression_bomb']}"
    except Exception:  # noqa: BLE001 - damaged headers make Pillow's decoders raise anything
        return "the image is no JPEG, PNG or WebP"
    fault = image_fault(data, max_pixels)
    return f"the image {_WHY.get(fault, fault)}" if fault else None
