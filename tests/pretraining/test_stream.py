from __future__ import annotations

import json

import numpy as np

from afmrl_ray.catalogue import make_catalogue
from afmrl_ray.catalogue.synthetic.make import products_of
from afmrl_ray.catalogue.synthetic.products import FORMS
from afmrl_ray.config.catalogue import SyntheticConfig
from afmrl_ray.pretraining.stream import (
    excluded_products,
    held_out_items,
    is_held_out,
    training_items,
    training_pairs,
)


def test_a_batch_is_a_function_of_seed_and_number():
    first, again = (training_items(5, 3, 8, frozenset()) for _ in range(2))
    assert all(np.array_equal(a.pixels, b.pixels) and a.title == b.title for a, b in zip(first, again, strict=True))
    others = [item for batch in (0, 1, 2) for item in training_items(5, batch, 8, frozenset())]
    others += training_items(6, 3, 8, frozenset())
    images = [item.pixels.tobytes() for item in (*first, *others)]
    assert len(set(images)) == len(images)


def test_pairs_are_two_renderings_of_different_products():
    pairs = training_pairs(1, 0, 12, frozenset())
    assert all(a.product == b.product and not np.array_equal(a.pixels, b.pixels) for a, b in pairs)
    assert len({a.product for a, _ in pairs}) == 12


def test_excluded_and_held_out_products_do_not_occur():
    drawn = [item.product for item in training_items(9, 0, 60, frozenset())]
    some = frozenset(drawn[::2])
    assert some.isdisjoint(item.product for item in training_items(9, 0, 60, some))
    assert some.isdisjoint(item.product for pair in training_pairs(9, 0, 30, some) for item in pair)
    assert not any(is_held_out(product) for product in drawn)
    assert all(is_held_out(item.product) for item in held_out_items(2, 10))


def test_the_products_of_a_catalogue_are_found_without_rendering_it():
    config = SyntheticConfig(preset="tiny", image_px=32)
    rows = make_catalogue(config).to_pylist()
    written = {(row["category"], row["true_attributes"]) for row in rows}
    found = products_of(config)
    assert {(product.category, json.dumps(product.attributes())) for product in found} == written
    assert excluded_products([config]) == found
    assert {product.category for product in found} <= set(FORMS)
