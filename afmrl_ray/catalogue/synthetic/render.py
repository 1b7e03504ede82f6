"""Images of the synthetic catalogue: a product drawn on a random background."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from afmrl_ray.catalogue.synthetic.products import COLORS, Product

Box = tuple[float, float, float, float]
Color = tuple[int, int, int]

BACKGROUNDS: dict[str, Color] = {
    "beige": (228, 214, 190),
    "grey": (190, 192, 196),
    "mint": (190, 224, 206),
    "sky": (188, 212, 236),
    "rose": (236, 204, 208),
    "lilac": (214, 202, 232),
    "sand": (214, 196, 158),
    "ivory": (238, 236, 222),
}
TRIM_COLORS: dict[str, Color] = {"gold": (214, 170, 40), "silver": (150, 158, 168)}
_OVERSAMPLING = 2


@dataclass(frozen=True)
class Rendering:
    """An encoded image and the boxes of its visible parts.

    Attributes:
        data: JPEG bytes.
        background: name of the background.
        boxes: part to (left, top, right, bottom), as fractions of the image's width and height.
    """

    data: bytes
    background: str
    boxes: dict[str, Box]


class _Canvas:
    """Draws in product coordinates: x and y from -1 to 1, then shifted and scaled."""

    def __init__(self, size: int, x: float, y: float, scale: float, background: Color) -> None:
        self.image = Image.new("RGB", (size, size), background)
        self._draw = ImageDraw.Draw(self.image)
        self._size, self._x, self._y, self._scale = size, x, y, scale
        self.background = background
        self.boxes: dict[str, Box] = {}

    def point(self, x: float, y: float) -> tuple[float, float]:
        half = self._size / 2
        return half * (1 + self._x + x * self._scale), half * (1 + self._y + y * self._scale)

    def points(self, *xy: float) -> list[tuple[float, float]]:
        return [self.point(x, y) for x, y in zip(xy[::2], xy[1::2], strict=True)]

    def width(self, fraction: float) -> int:
        return max(1, round(fraction * self._scale * self._size / 2))

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Color) -> None:
        self._draw.rectangle(self.points(x0, y0, x1, y1), fill=fill)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: Color) -> None:
        self._draw.ellipse(self.points(x0, y0, x1, y1), fill=fill)

    def polygon(self, *xy: float, fill: Color) -> None:
        self._draw.polygon(self.points(*xy), fill=fill)

    def arc(self, x0: float, y0: float, x1: float, y1: float, start: int, end: int, fill: Color, width: float) -> None:
        self._draw.arc(self.points(x0, y0, x1, y1), start, end, fill=fill, width=self.width(width))

    def mark(self, part: str, x0: float, y0: float, x1: float, y1: float) -> None:
        (left, top), (right, bottom) = self.points(x0, y0, x1, y1)
        self.boxes[part] = (left / self._size, top / self._size, right / self._size, bottom / self._size)

    def body(self, shape: str, box: Box, fill: Color, pattern: str, ink: Color, *outline: float) -> None:
        """Draw a shape filled with a colour and a pattern."""
        mask = Image.new("L", self.image.size, 0)
        draw = ImageDraw.Draw(mask)
        if shape == "ellipse":
            draw.ellipse(self.points(*box), fill=255)
        elif shape == "rounded":
            draw.rounded_rectangle(self.points(*box), self.width(0.12), fill=255)
        else:
            draw.polygon(self.points(*outline), fill=255)
        self.image.paste(self._patterned(box, fill, pattern, ink), mask=mask)
        self.mark("body", *box)

    def _patterned(self, box: Box, fill: Color, pattern: str, ink: Color) -> Image.Image:
        layer = Image.new("RGB", self.image.size, fill)
        draw = ImageDraw.Draw(layer)
        x0, y0, x1, y1 = box
        if pattern in ("striped", "checked"):
            for y in np.arange(y0 + 0.06, y1, 0.22):
                draw.rectangle(self.points(x0, float(y), x1, float(y) + 0.09), fill=ink)
        if pattern == "checked":
            for x in np.arange(x0 + 0.06, x1, 0.22):
                draw.rectangle(self.points(float(x), y0, float(x) + 0.09, y1), fill=ink)
        if pattern == "dotted":
            for y in np.arange(y0 + 0.1, y1, 0.22):
                for x in np.arange(x0 + 0.1, x1, 0.22):
                    draw.ellipse(
                        self.points(float(x) - 0.06, float(y) - 0.06, float(x) + 0.06, float(y) + 0.06), fill=ink
                    )
        return layer


def render(product: Product, draw: np.random.Generator, size: int) -> Rendering:
    """Draw one item of a product; background, brightness, position, scale, crop and noise are drawn for each item.

    Args:
        product: what to draw.
        draw: random generator.
        size: width and height of the image, pixels.
    """
    name = str(draw.choice(list(BACKGROUNDS)))
    x, y = draw.uniform(-0.1, 0.1, size=2)
    canvas = _Canvas(size * _OVERSAMPLING, float(x), float(y), float(draw.uniform(0.78, 0.98)), BACKGROUNDS[name])
    _floor(canvas, draw)
    _PAINTERS[product.category](canvas, product)
    side = canvas.image.size[0]
    window = float(draw.uniform(0.9, 1.0))
    left, top = draw.uniform(0, 1 - window, size=2)
    crop = tuple(round(side * edge) for edge in (left, top, left + window, top + window))
    small = canvas.image.resize((size, size), Image.Resampling.BILINEAR, box=crop)
    pixels = np.asarray(small, dtype=np.float32) * draw.uniform(0.78, 1.08)
    pixels += draw.normal(0, 6, pixels.shape).astype(np.float32)
    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
    return Rendering(
        data.getvalue(), name, {part: _cropped(box, left, top, window) for part, box in canvas.boxes.items()}
    )


def _cropped(box: Box, left: float, top: float, window: float) -> Box:
    shift = (left, top, left, top)
    return tuple(round(min(1.0, max(0.0, (edge - s) / window)), 4) for edge, s in zip(box, shift, strict=True))  # type: ignore[return-value]


def _floor(canvas: _Canvas, draw: np.random.Generator) -> None:
    """Draw a darker floor behind the product."""
    size = canvas.image.size[0]
    level = round(size * draw.uniform(0.66, 0.84))
    shade = tuple(round(value * 0.9) for value in canvas.background)
    ImageDraw.Draw(canvas.image).rectangle((0, level, size, size), fill=shade)


def _ink(color: Color) -> Color:
    """A darker or lighter tone of a colour that contrasts with it."""
    return tuple(round(v * 0.5) if sum(color) > 170 else min(255, v + 105) for v in color)  # type: ignore[return-value]


def _details(canvas: _Canvas, product: Product, logo: Box, trim: Box) -> None:
    """Draw the trim, and the logo in a frame that makes it visible on any pattern."""
    if product.trim in TRIM_COLORS:
        canvas.rectangle(*trim, fill=TRIM_COLORS[product.trim])
        canvas.mark("trim", *trim)
    x0, y0, x1, y1 = logo
    frame = (250, 250, 250) if product.logo != "white" else (40, 40, 40)
    canvas.rectangle(x0 - 0.035, y0 - 0.035, x1 + 0.035, y1 + 0.035, fill=frame)
    canvas.rectangle(*logo, fill=COLORS[product.logo])
    canvas.mark("logo", *logo)


def _shirt(canvas: _Canvas, product: Product) -> None:
    color = COLORS[product.color]
    box = (-0.5, -0.62, 0.5, 0.72)
    canvas.polygon(-0.5, -0.62, -0.92, -0.2, -0.72, 0.06, -0.5, -0.14, fill=color)
    canvas.polygon(0.5, -0.62, 0.92, -0.2, 0.72, 0.06, 0.5, -0.14, fill=color)
    canvas.body("rounded", box, color, product.pattern, _ink(color))
    if product.form == "v-neck":
        canvas.polygon(-0.24, -0.64, 0.24, -0.64, 0.0, -0.2, fill=canvas.background)
    elif product.form == "round-neck":
        canvas.ellipse(-0.25, -0.86, 0.25, -0.36, fill=canvas.background)
    else:
        canvas.polygon(-0.3, -0.74, 0.0, -0.5, -0.16, -0.3, -0.36, -0.52, fill=_ink(color))
        canvas.polygon(0.3, -0.74, 0.0, -0.5, 0.16, -0.3, 0.36, -0.52, fill=_ink(color))
    canvas.mark("form", -0.36, -0.86, 0.36, -0.2)
    _details(canvas, product, (-0.16, 0.0, 0.16, 0.32), (-0.5, 0.6, 0.5, 0.72))


def _mug(canvas: _Canvas, product: Product) -> None:
    color = COLORS[product.color]
    if product.form == "left-handle":
        canvas.arc(-0.92, -0.3, -0.2, 0.42, 90, 270, fill=color, width=0.13)
        canvas.mark("form", -0.92, -0.3, -0.5, 0.42)
    elif product.form == "right-handle":
        canvas.arc(0.2, -0.3, 0.92, 0.42, -90, 90, fill=color, width=0.13)
        canvas.mark("form", 0.5, -0.3, 0.92, 0.42)
    canvas.body("rounded", (-0.52, -0.6, 0.52, 0.7), color, product.pattern, _ink(color))
    canvas.ellipse(-0.5, -0.7, 0.5, -0.5, fill=_ink(color))
    _details(canvas, product, (-0.16, -0.08, 0.16, 0.26), (-0.52, 0.5, 0.52, 0.62))


def _bag(canvas: _Canvas, product: Product) -> None:
    color = COLORS[product.color]
    if product.form == "short-strap":
        canvas.arc(-0.3, -0.55, 0.3, 0.05, 180, 360, fill=_ink(color), width=0.09)
        canvas.mark("form", -0.3, -0.55, 0.3, -0.2)
    elif product.form == "long-strap":
        canvas.arc(-0.42, -1.0, 0.42, 0.7, 180, 360, fill=_ink(color), width=0.07)
        canvas.mark("form", -0.42, -1.0, 0.42, -0.2)
    outline = (-0.5, -0.22, 0.5, -0.22, 0.68, 0.74, -0.68, 0.74)
    canvas.body("polygon", (-0.68, -0.22, 0.68, 0.74), color, product.pattern, _ink(color), *outline)
    _details(canvas, product, (-0.16, 0.16, 0.16, 0.48), (-0.52, -0.22, 0.52, -0.1))


def _lamp(canvas: _Canvas, product: Product) -> None:
    color = COLORS[product.color]
    canvas.rectangle(-0.07, 0.1, 0.07, 0.62, fill=(96, 88, 82))
    canvas.rectangle(-0.36, 0.56, 0.36, 0.74, fill=(96, 88, 82))
    if product.form == "cone-shade":
        box, outline = (-0.72, -0.72, 0.72, 0.16), (-0.22, -0.72, 0.22, -0.72, 0.72, 0.16, -0.72, 0.16)
        canvas.body("polygon", box, color, product.pattern, _ink(color), *outline)
    elif product.form == "round-shade":
        canvas.body("ellipse", (-0.56, -0.84, 0.56, 0.2), color, product.pattern, _ink(color))
    else:
        box = (-0.56, -0.72, 0.56, 0.16)
        canvas.body(
            "polygon", box, color, product.pattern, _ink(color), -0.56, -0.72, 0.56, -0.72, 0.56, 0.16, -0.56, 0.16
        )
    canvas.mark("form", *(-0.72, -0.84, 0.72, 0.2))
    _details(canvas, product, (-0.15, -0.42, 0.15, -0.12), (-0.36, 0.46, 0.36, 0.58))


def _shoe(canvas: _Canvas, product: Product) -> None:
    color = COLORS[product.color]
    height = {"flat-heel": 0.0, "block-heel": 0.22, "high-heel": 0.4}[product.form]
    if product.form == "block-heel":
        canvas.rectangle(-0.8, 0.34, -0.4, 0.7, fill=_ink(color))
    elif product.form == "high-heel":
        canvas.polygon(-0.8, 0.1, -0.54, 0.1, -0.66, 0.74, -0.76, 0.74, fill=_ink(color))
    canvas.mark("form", -0.84, 0.5 - height, -0.36, 0.74)
    lift = height
    outline = (
        -0.82,
        -0.42 - lift / 2,
        -0.3,
        -0.42 - lift / 2,
        0.1,
        0.04,
        0.84,
        0.3,
        0.86,
        0.62,
        0.2,
        0.62,
        -0.82,
        0.62 - lift,
    )
    canvas.body("polygon", (-0.82, -0.62, 0.86, 0.62), color, product.pattern, _ink(color), *outline)
    _details(canvas, product, (-0.5, -0.12 - lift / 3, -0.2, 0.18 - lift / 3), (0.14, 0.6, 0.86, 0.72))


def _bottle(canvas: _Canvas, product: Product) -> None:
    color = COLORS[product.color]
    canvas.body("rounded", (-0.38, -0.3, 0.38, 0.8), color, product.pattern, _ink(color))
    canvas.rectangle(-0.14, -0.56, 0.14, -0.28, fill=color)
    if product.form == "screw-cap":
        canvas.rectangle(-0.24, -0.78, 0.24, -0.52, fill=(70, 74, 80))
    elif product.form == "pump-cap":
        canvas.rectangle(-0.05, -0.86, 0.05, -0.52, fill=(70, 74, 80))
        canvas.rectangle(-0.08, -0.94, 0.46, -0.8, fill=(70, 74, 80))
    else:
        canvas.polygon(-0.16, -0.84, 0.16, -0.84, 0.12, -0.52, -0.12, -0.52, fill=(196, 150, 98))
    canvas.mark("form", -0.26, -0.94, 0.46, -0.5)
    _details(canvas, product, (-0.17, 0.1, 0.17, 0.44), (-0.38, -0.2, 0.38, -0.08))


_PAINTERS = {"shirt": _shirt, "mug": _mug, "bag": _bag, "lamp": _lamp, "shoe": _shoe, "bottle": _bottle}
