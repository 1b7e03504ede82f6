"""Images look to the models as they look in a viewer."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from afmrl_ray.catalogue.images import decode_image, image_size


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **settings)
    return target.getvalue()


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (250, 10, 10))
    image.paste((10, 10, 250), (width // 2, 0, width, height))
    return image


def near(pixel, expected, *, within: int = 12) -> bool:
    return all(abs(a - b) <= within for a, b in zip(pixel, expected, strict=True))


@pytest.mark.parametrize(
    ("orientation", "size", "top_left"),
    [(1, (40, 20), "red"), (2, (40, 20), "blue"), (3, (40, 20), "blue"), (6, (20, 40), "red"), (8, (20, 40), "blue")],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_are_turned_upright(orientation, size, top_left, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(halves(), kind, exif=exif.tobytes())
    image = decode_image(data)
    assert image.size == image_size(data) == size
    assert near(image.getpixel((1, 1)), {"red": (250, 10, 10), "blue": (10, 10, 250)}[top_left], within=30)


def ramp() -> np.ndarray:
    return np.linspace(0, 65535, 512).round().astype(np.uint16).reshape(8, 64)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(ramp())),
        encoded(Image.fromarray(ramp()), "TIFF"),
        encoded(Image.fromarray(ramp().astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(ramp().astype(np.float32) / 65535), "TIFF"),
        b"P5 64 8 65535\n" + ramp().astype(">u2").tobytes(),
    ],
    ids=["png-16", "tiff-16", "tiff-32", "tiff-float", "pgm-16"],
)
def test_deep_greys_are_scaled_and_not_cut_off(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    found = np.asarray(image)[..., 0].astype(int)
    assert np.abs(found - ramp() / 257).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    found = decode_image(encoded(image.convert(mode)))
    assert near(found.getpixel((1, 1)), (0, 0, 0))
    assert near(found.getpixel((6, 1)), (255, 255, 255))


def test_a_transparent_palette_entry_shows_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((0, 0), 0)
    found = decode_image(encoded(image, "GIF", transparency=0))
    assert near(found.getpixel((0, 0)), (255, 255, 255))
    assert near(found.getpixel((2, 2)), (200, 0, 0))


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert near(decode_image(data).getpixel((0, 0)), (255, 0, 0))


def test_colours_of_a_profile_become_srgb():
    """The swapped primaries of this profile are seen only by applying it."""
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    image = ImageCms.profileToProfile(halves(), srgb, lab, outputMode="LAB")
    assert near(decode_image(encoded(image, "TIFF")).getpixel((2, 2)), (250, 10, 10), within=20)
    damaged = encoded(halves(), icc_profile=b"no profile")
    assert decode_image(damaged).getpixel((2, 2)) == (250, 10, 10)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    found = decode_image(encoded(image, kind))
    assert found.mode == "RGB"
    assert near(found.getpixel((3, 3)), (255, 255, 255))
