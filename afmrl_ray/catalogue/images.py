"""Decoding images as viewers show them: upright, 8 bits a channel, sRGB, opaque, the first frame."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps

try:  # `pip install .[heif]`: phones send HEIC
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()

DECODING = 2
"""Version of the decoding: what was computed of decoded images is valid for one version."""
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
_PAPER = (255, 255, 255)
"""What shows through transparent pixels."""


def decode_image(data: bytes, *, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decode an image as a viewer shows it, RGB.

    EXIF orientation is applied, more than 8 bits a channel are scaled down, colours of an embedded ICC profile are
    converted to sRGB, and transparent pixels show white. Of an animation it is the first frame.

    Args:
        data: the encoded image.
        formats: Pillow's names of the formats that are tried; None = all.

    Raises:
        Exception: of many types, where Pillow cannot decode the data.
    """
    with Image.open(io.BytesIO(data), formats=formats) as opened:
        opened.load()
        profile = opened.info.get("icc_profile")
        image = ImageOps.exif_transpose(opened)
        image = _eight_bits(image)
        alpha = None
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            alpha, image = rgba.getchannel("A"), rgba.convert("RGB")
        image = _to_srgb(image, profile)
    if alpha is None:
        return image
    paper = Image.new("RGB", image.size, _PAPER)
    paper.paste(image, mask=alpha)
    return paper


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of an image as `decode_image` gives it, from its header alone."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (width, height)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 or 32 bits a pixel as 8 bits; Pillow's own conversion cuts values above 255 off.

    16-bit values are divided by 257. 32-bit integers are 16-bit values in a wider type (as in PGM), unless they
    exceed them; floats are between 0 and 1 or between 0 and 255. Whatever exceeds these ranges is stretched over them.
    """
    if image.mode.startswith("I;16"):
        native = ">u2" if image.mode.endswith("B") else "<u2"
        values = np.frombuffer(image.tobytes(), dtype=native).reshape(image.height, image.width)
        return Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "I":
        integers = np.asarray(image, dtype=np.int64)
        if integers.min() >= 0 and integers.max() < 2**16:
            return Image.fromarray((integers // 257).astype(np.uint8))
        return _stretched(integers.astype(np.float64))
    if image.mode == "F":
        floats = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
        if floats.min() >= 0 and floats.max() <= 255:
            scale = 255.0 if floats.max() <= 1 else 1.0
            return Image.fromarray((floats * scale).round().astype(np.uint8))
        return _stretched(floats)
    return image


def _stretched(values: np.ndarray) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    return Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB; a profile that is damaged or of another colour space than the image is ignored, as viewers do."""
    if image.mode == "LAB":
        return _converted(image, ImageCms.createProfile("LAB")) or image.convert("L").convert("RGB")
    if profile and image.mode in ("RGB", "L", "CMYK"):
        try:
            found = _converted(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except OSError:
            found = None
        if found is not None:
            return found
    return image.convert("RGB")


def _converted(image: Image.Image, profile: ImageCms.core.CmsProfile | ImageCms.ImageCmsProfile) -> Image.Image | None:
    try:
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        return None
