"""An endless stream of fresh renderings of random products: batch b is a function of (seed, b) alone.

No product of the held-out tenth, nor of the excluded catalogues, is ever in a training batch. The draws of every batch
have a random generator of their own, so no image occurs twice.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from afmrl_ray.catalogue.synthetic.make import products_of
from afmrl_ray.catalogue.synthetic.products import Product, random_product
from afmrl_ray.catalogue.synthetic.render import Box, render
from afmrl_ray.catalogue.synthetic.texts import SYNONYMS, title
from afmrl_ray.config.catalogue import SyntheticConfig

IMAGE_PX = 112
HELD_OUT_FRACTION = 0.1
TITLES = tuple(
    SyntheticConfig(title_mention_rate=visible, title_hidden_mention_rate=hidden)
    for visible in (0.0, 0.15, 0.35, 0.6)
    for hidden in (0.5, 0.8, 1.0)
)
"""How much titles of training items name: from almost nothing to twice as much as the catalogue's own."""
_CATALOGUE_TITLES = (SyntheticConfig(),)
_LADDER = {"preset": "bench", "train_products": 1200, "val_products": 100, "test_products": 2000}
EXCLUDED = (
    *(SyntheticConfig(preset=preset) for preset in ("tiny", "demo", "bench")),
    *(SyntheticConfig(seed=seed, **_LADDER) for seed in range(100, 105)),
)
"""The catalogues whose products the packaged checkpoints' images exclude."""


@dataclass(frozen=True)
class StreamItem:
    """One rendering.

    Attributes:
        product: what it shows.
        pixels: [IMAGE_PX, IMAGE_PX, 3] uint8, after JPEG.
        title: seller's text.
        background: name of the background.
        boxes: of the visible parts.
    """

    product: Product
    pixels: np.ndarray
    title: str
    background: str
    boxes: dict[str, Box]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def names(self, field: str) -> bool:
        """Whether the title names the value of a product's field, in itself or as a synonym."""
        value = getattr(self.product, field)
        return not set(self.title.split()).isdisjoint(SYNONYMS.get(value, (value,)))


def is_held_out(product: Product) -> bool:
    """Whether a product belongs to the tenth that no training sees: a hash of the product alone."""
    digest = hashlib.sha256("|".join([product.category, *product.attributes().values()]).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_FRACTION * 2**32


def excluded_products(catalogues: Iterable[SyntheticConfig] = EXCLUDED) -> frozenset[Product]:
    """All products of synthetic catalogues, without rendering them."""
    return frozenset(product for config in catalogues for product in products_of(config))


def training_items(seed: int, batch: int, size: int, excluded: frozenset[Product]) -> list[StreamItem]:
    """Items of one batch, each of a random product.

    Args:
        seed: of the stream.
        batch: number of the batch.
        size: items.
        excluded: products that must not occur, besides the held-out ones.
    """
    draw = np.random.default_rng([seed, batch])
    return [_item(_product(draw, _trainable(excluded)), draw, TITLES) for _ in range(size)]


def training_pairs(
    seed: int, batch: int, size: int, excluded: frozenset[Product]
) -> list[tuple[StreamItem, StreamItem]]:
    """Two items of each of `size` different products; see `training_items` for the arguments."""
    draw = np.random.default_rng([seed, batch])
    products: dict[Product, None] = {}
    while len(products) < size:
        products[_product(draw, _trainable(excluded))] = None
    return [(_item(product, draw, TITLES), _item(product, draw, TITLES)) for product in products]


def held_out_items(seed: int, count: int) -> list[StreamItem]:
    """Items of held-out products, with titles as the catalogue's own."""
    draw = np.random.default_rng([seed, 0])
    return [_item(_product(draw, is_held_out), draw, _CATALOGUE_TITLES) for _ in range(count)]


def _trainable(excluded: frozenset[Product]) -> Callable[[Product], bool]:
    return lambda product: product not in excluded and not is_held_out(product)


def _product(draw: np.random.Generator, wanted: Callable[[Product], bool]) -> Product:
    while not wanted(product := random_product(draw)):
        pass
    return product


def _item(product: Product, draw: np.random.Generator, titles: tuple[SyntheticConfig, ...]) -> StreamItem:
    image = render(product, draw, IMAGE_PX)
    pixels = np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB"))
    words = title(product, draw, titles[int(draw.integers(len(titles)))])
    return StreamItem(product, pixels, words, image.background, image.boxes)
