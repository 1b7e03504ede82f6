"""Texts with one attribute changed, and regions with their phrases."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from afmrl_ray.agcl.dual_inputs import changed_texts, crop, parse_boxes, regions, values_by_name
from afmrl_ray.attributes.text import format_attributes, parse_attributes
from afmrl_ray.catalogue.synthetic.products import COLORS

NAMES = st.sampled_from(["color", "shape", "trim", "cap"])
PAIRS = st.dictionaries(NAMES, st.sampled_from(["a", "b", "c", "d e"]), min_size=1).map(lambda d: tuple(d.items()))


@given(PAIRS, st.lists(PAIRS, min_size=1), st.integers(1, 6), st.integers(0, 99))
def test_changed_texts_replace_exactly_one_value_by_a_known_one(attributes, others, count, seed):
    values = values_by_name([attributes, *others])
    found = changed_texts(attributes, values, count=count, draw=np.random.default_rng(seed))
    possible = sum(len(set(values[name]) - {value}) for name, value in attributes)
    assert len(found) == len(set(found)) == min(count, possible)
    for text in found:
        changed = parse_attributes(text, max_attributes=9)
        assert [name for name, _ in changed] == [name for name, _ in attributes]
        differing = [new for new, old in zip(changed, attributes, strict=True) if new != old]
        assert len(differing) == 1
        assert differing[0][1] in values[differing[0][0]]


def test_the_phrase_of_a_region_describes_its_crop(tiny_catalogue_ref):
    """The crop of a logo has the logo's colour; its phrase names it."""
    catalogue = tiny_catalogue_ref.open()
    parts = {"body": ("color", "pattern")}
    seen = 0
    for row in range(0, len(catalogue), 5):
        item = catalogue.item(row)
        truth = tuple(json.loads(item.extra["true_attributes"]).items())
        found = {region.part: region for region in regions(parse_boxes(item.extra["boxes"]), truth, parts)}
        values = dict(truth)
        assert found["body"].phrase == f"color: {values['color']}; pattern: {values['pattern']}"
        assert found["logo"].phrase == f"logo: {values['logo']}"
        shown = np.asarray(crop(catalogue.image(row), found["logo"].box), dtype=float)
        middle = shown[shown.shape[0] // 2, shown.shape[1] // 2]
        nearest = min(COLORS, key=lambda name: np.abs(middle - COLORS[name]).sum())
        seen += nearest == values["logo"]
    assert seen >= 0.9 * len(range(0, len(catalogue), 5))


def test_parts_without_attributes_or_area_are_left_out():
    boxes = {"logo": [0.1, 0.1, 0.5, 0.5], "trim": [0.5, 0.5, 0.5, 0.9], "shadow": [0, 0, 1, 1]}
    found = regions(boxes, (("logo", "red"), ("trim", "gold")), {})
    assert [region.part for region in found] == ["logo"]
    assert parse_boxes(None) == parse_boxes("") == {}


def test_a_tiny_box_gives_two_pixels_inside_the_image(tiny_catalogue_ref):
    image = tiny_catalogue_ref.open().image(0)
    assert crop(image, (0.999, 0.999, 1.0, 1.0)).size == (2, 2)
    assert format_attributes(()) == ""
