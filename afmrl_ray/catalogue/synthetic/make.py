"""Generation of the synthetic catalogue; the result depends on its config alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from afmrl_ray.catalogue.synthetic.products import Product, families
from afmrl_ray.catalogue.synthetic.render import render
from afmrl_ray.catalogue.synthetic.texts import teacher_attributes, title
from afmrl_ray.config.catalogue import SyntheticConfig

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"train_products": 24, "val_products": 8, "test_products": 12, "items_per_product": 3},
    "demo": {"train_products": 900, "val_products": 100, "test_products": 400, "items_per_product": 3},
    "bench": {"train_products": 2400, "val_products": 200, "test_products": 2100, "items_per_product": 3},
}
SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("product_id", pa.string()),
        ("category", pa.string()),
        ("title", pa.string()),
        ("attributes", pa.string()),
        ("image", pa.binary()),
        ("split", pa.string()),
        ("role", pa.string()),
        ("family_id", pa.string()),
        ("true_product_id", pa.string()),
        ("true_attributes", pa.string()),
        ("boxes", pa.string()),
    ]
)


def make_catalogue(config: SyntheticConfig) -> pa.Table:
    """Generate all items.

    Besides the columns of `catalogue.schema` there are `family_id`, `true_product_id` (the identity, which duplicates
    under another product_id share), `true_attributes` and `boxes` (JSON). `attributes` are the teacher's.
    """
    return pa.Table.from_pylist(list(_items(config)), schema=SCHEMA)


def products_of(config: SyntheticConfig) -> set[Product]:
    """The products of the catalogue that `make_catalogue` would write, without their images."""
    return {product for product, _, _, _ in _products(config)}


def _items(config: SyntheticConfig) -> Iterator[dict[str, Any]]:
    copies = config.items_per_product or PRESETS[config.preset]["items_per_product"]
    for product, product_ids, family, split in _products(config):
        for product_id in product_ids:
            for copy in range(copies):
                yield _item(config, product, product_id, product_ids[0], family, split, copy)


def _products(config: SyntheticConfig) -> Iterator[tuple[Product, list[str], str, str]]:
    """Every product with its identity and those of its duplicates, its family and split."""
    size = {name: getattr(config, name) or value for name, value in PRESETS[config.preset].items()}
    draw = np.random.default_rng([config.seed, 0])
    seen: set[Product] = set()
    for split in ("train", "val", "test"):
        number = 0
        made = families(size[f"{split}_products"], config.siblings_per_family, draw, seen)
        for index, family in enumerate(made):
            for product in family:
                identity = f"{split}-{number:05d}"
                number += 1
                product_ids = [identity]
                if split == "train" and draw.random() < config.duplicate_fraction:
                    product_ids.append(f"{identity}-again")
                yield product, product_ids, f"{split}-f{index:04d}", split


def _item(
    config: SyntheticConfig, product: Product, product_id: str, identity: str, family: str, split: str, copy: int
) -> dict[str, Any]:
    item = f"{product_id}-{copy}"
    draw = np.random.default_rng([config.seed, 1, *item.encode()])
    image = render(product, draw, config.image_px)
    return {
        "item_id": item,
        "product_id": product_id,
        "category": product.category,
        "title": title(product, draw, config),
        "attributes": json.dumps(teacher_attributes(product, image.background, draw, config)),
        "image": image.data,
        "split": split,
        "role": None if split == "train" else "query" if copy == 0 else "gallery",
        "family_id": family,
        "true_product_id": identity,
        "true_attributes": json.dumps(product.attributes()),
        "boxes": json.dumps(image.boxes),
    }
