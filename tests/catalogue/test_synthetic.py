from __future__ import annotations

import io
import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from afmrl_ray.catalogue import make_catalogue
from afmrl_ray.catalogue.contact_sheet import contact_sheet
from afmrl_ray.catalogue.synthetic.products import COLORS
from afmrl_ray.catalogue.table import CatalogueTable
from afmrl_ray.config.catalogue import SyntheticConfig

CONFIG = SyntheticConfig(
    preset="tiny", train_products=240, val_products=12, test_products=24, image_px=64, duplicate_fraction=0.2
)


@pytest.fixture(scope="module")
def items() -> list[dict]:
    return make_catalogue(CONFIG).to_pylist()


def test_equal_configs_give_equal_catalogues_and_another_seed_another_one():
    small = SyntheticConfig(preset="tiny", image_px=48)
    assert make_catalogue(small).equals(make_catalogue(small))
    other = make_catalogue(SyntheticConfig(preset="tiny", image_px=48, seed=8))
    assert other["image"].to_pylist() != make_catalogue(small)["image"].to_pylist()


def test_preset_bench_has_two_thousand_test_queries():
    from afmrl_ray.catalogue.synthetic.make import PRESETS

    assert PRESETS["bench"]["test_products"] >= 2000


def test_there_are_six_categories_and_at_least_five_attributes(items):
    assert len({row["category"] for row in items}) >= 6
    assert min(len(json.loads(row["true_attributes"])) for row in items) >= 5


def test_siblings_differ_in_exactly_one_attribute_from_one_of_their_family(items):
    families = defaultdict(dict)
    for row in items:
        families[row["family_id"]][row["true_product_id"]] = json.loads(row["true_attributes"])
    assert len(families) > 40
    for members in families.values():
        products = list(members.values())
        assert len({json.dumps(product) for product in products}) == len(products)
        for product in products[1:]:
            assert 1 in [
                sum(a != b for a, b in zip(product.values(), other.values(), strict=True))
                for other in products
                if other is not product
            ]


def test_no_family_and_no_product_is_in_two_splits(items):
    for column in ("family_id", "true_attributes"):
        splits = defaultdict(set)
        for row in items:
            splits[row[column] + (row["category"] if column == "true_attributes" else "")].add(row["split"])
        assert all(len(found) == 1 for found in splits.values())


def test_evaluation_has_one_query_per_product_and_the_rest_as_gallery(items):
    roles = defaultdict(list)
    for row in items:
        if row["split"] != "train":
            roles[row["product_id"]].append(row["role"])
        else:
            assert row["role"] is None
    assert all(sorted(found) == ["gallery", "gallery", "query"] for found in roles.values())


def test_duplicates_have_another_product_id_and_the_same_true_product_id(items):
    identities = defaultdict(set)
    for row in items:
        identities[row["true_product_id"]].add(row["product_id"])
    twice = [name for name, ids in identities.items() if len(ids) == 2]
    train = [name for name in identities if name.startswith("train")]
    assert len(twice) / len(train) == pytest.approx(0.2, abs=0.08)
    assert all(name.startswith("train") for name in twice)


def test_wrong_missing_and_irrelevant_teacher_attributes_occur_at_the_configured_rates(items):
    right = wrong = missing = irrelevant = 0
    for row in items:
        truth, given = json.loads(row["true_attributes"]), json.loads(row["attributes"])
        missing += sum(name not in given for name in truth)
        wrong += sum(name in given and given[name] != value for name, value in truth.items())
        right += sum(given.get(name) == value for name, value in truth.items())
        irrelevant += sum(name not in truth for name in given)
    total = right + wrong + missing
    assert missing / total == pytest.approx(0.1, abs=0.02)
    assert wrong / (right + wrong) == pytest.approx(0.1, abs=0.02)
    assert irrelevant / (3 * len(items)) == pytest.approx(0.5, abs=0.04)


def test_single_attributes_may_have_a_rate_of_their_own_at_which_the_teacher_omits_them():
    rates = {"logo": 0.75, "form": 1.0}
    config = CONFIG.model_copy(update={"image_px": 32, "teacher_missing_rates": rates})
    rows = make_catalogue(config).to_pylist()
    given = [json.loads(row["attributes"]) for row in rows]
    forms = {name for row in rows for name in list(json.loads(row["true_attributes"]))[2:3]}
    assert np.mean(["logo" in each for each in given]) == pytest.approx(0.25, abs=0.05)
    assert np.mean(["trim" in each for each in given]) == pytest.approx(0.9, abs=0.05)
    assert not any(forms & set(each) for each in given)


def test_items_of_a_product_differ_in_image_and_title(items):
    by_product = defaultdict(list)
    for row in items:
        by_product[row["product_id"]].append(row)
    for rows in by_product.values():
        assert len({row["image"] for row in rows}) == len(rows)
    titles = [len({row["title"] for row in rows}) for rows in by_product.values()]
    assert np.mean(titles) > 2.5


def test_the_box_of_the_logo_contains_its_colour(items):
    inside = []
    for row in items[::7]:
        boxes = json.loads(row["boxes"])
        for box in boxes.values():
            assert all(0 <= edge <= 1 for edge in box)
            assert box[0] <= box[2]
            assert box[1] <= box[3]
        pixels = np.asarray(Image.open(io.BytesIO(row["image"])), dtype=float)
        left, top, right, bottom = (round(edge * 64) for edge in boxes["logo"])
        middle = pixels[top + 2 : bottom - 2, left + 2 : right - 2].reshape(-1, 3).mean(0)
        names = list(COLORS)
        # Light scales all channels alike, so directions are compared first and brightness second.
        distance = [np.linalg.norm(middle / (middle.max() + 1) - np.array(c) / (max(c) + 1)) +
                    abs(middle.max() - max(c)) / 400 for c in COLORS.values()]  # fmt: skip
        inside.append(names[int(np.argmin(distance))] == json.loads(row["true_attributes"])["logo"])
    assert np.mean(inside) > 0.85


def test_titles_contain_only_some_attributes(items):
    named = [
        sum(value in row["title"].split() for value in json.loads(row["true_attributes"]).values()) for row in items
    ]
    assert 1 < np.mean(named) < 4


def test_a_contact_sheet_shows_every_item(items):
    catalogue = CatalogueTable(make_catalogue(SyntheticConfig(preset="tiny", image_px=48)), "synthetic", "")
    sheet = contact_sheet(catalogue, list(range(8)), columns=4, image_px=60)
    pixels = np.asarray(sheet)
    for index in range(8):
        x, y = 8 + index % 4 * 68, 8 + index // 4 * (60 + 6 * 13 + 8)
        assert pixels[y : y + 60, x : x + 60].std() > 5
