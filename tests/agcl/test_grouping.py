"""An epoch's order made of groups, and groups by attributes in the batches of a catalogue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_ray.agcl.batches import PairSampler
from afmrl_ray.agcl.grouping import epoch_order
from afmrl_ray.attributes.store import AttributeRow, AttributeStore, read_attributes, write_attributes
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.config import validate
from afmrl_ray.config.train import AGCLConfig
from afmrl_ray.errors import CatalogueError, ConfigError


class Runs:
    """Groups of `size` products with adjacent codes, placed products among them."""

    def __init__(self, count: int, size: int) -> None:
        self.all = [list(range(first, min(first + size, count))) for first in range(0, count, size)]

    def groups(self, draw: np.random.Generator, free: np.ndarray) -> Iterator[Sequence[int]]:
        for place in draw.permutation(len(self.all)).tolist():
            yield self.all[place]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.data())
def test_an_order_holds_every_product_once_whatever_the_groups(count, batch, size, seed, data):
    batches = count // batch
    grouped = data.draw(st.lists(st.integers(0, batch), min_size=batches, max_size=batches))
    draw = np.random.default_rng(seed)
    order = epoch_order(count, batch, Runs(count, size), draw, grouped=grouped)
    assert len(order) == len(set(order.tolist())) == batches * batch


def test_a_batch_begins_with_whole_groups_and_warmup_batches_are_uniform():
    order = epoch_order(64, 8, Runs(64, 4), np.random.default_rng(0), grouped=[0, 0, 8, 8]).reshape(4, 8) // 4
    # Groups that lost members to the first batches are continued by others.
    whole = [sum(members.tolist().count(group) for group in set(members.tolist())) for members in order]
    assert whole == [8] * 4
    assert all(len(set(members.tolist())) >= 5 for members in order[:2])
    assert all(len(set(members.tolist())) <= 4 for members in order[2:])


@pytest.fixture(scope="module")
def catalogue(tiny_catalogue_ref):
    return tiny_catalogue_ref.open()


def store_of(texts: dict[str, str], folder) -> AttributeStore:
    path = str(folder / "attributes.parquet")
    rows = [AttributeRow(item, text, None if text else "no_pair") for item, text in texts.items()]
    write_attributes(path, rows, fingerprint="teacher")
    return read_attributes(path)


@pytest.fixture(scope="module")
def store(catalogue, tmp_path_factory) -> AttributeStore:
    """The true attributes of every item."""
    items = [catalogue.item(row) for row in range(len(catalogue))]
    texts = {item.item_id: format_attributes(normalise_attributes(item.attributes)) for item in items}
    return store_of(texts, tmp_path_factory.mktemp("store"))


def sampler_of(catalogue, store: AttributeStore | None, *, seed: int = 0, **grouping) -> PairSampler:
    given = {"fraction": 0.5, "by": "attributes", "group_size": 4, **grouping}
    return PairSampler(catalogue, AGCLConfig(batch_size=8, batch_grouping=given), seed=seed, store=store)


def epoch(sampler: PairSampler, number: int = 0) -> list[list[int]]:
    """The products of each batch of an epoch."""
    steps = range(number * sampler.steps_per_epoch, (number + 1) * sampler.steps_per_epoch)
    return [[pair.query.product for pair in sampler.batch(step)] for step in steps]


def common_pairs(catalogue, store: AttributeStore, sampler: PairSampler) -> float:
    """Mean number of attribute pairs that the first product of a batch shares with the three after it."""
    items = {}
    for step in range(sampler.steps_per_epoch):
        for pair in sampler.batch(step):
            items[pair.query.product] = set(store.get(catalogue.column("item_id")[pair.query.row]))
    batches = epoch(sampler)
    return float(np.mean([len(items[batch[0]] & items[other]) for batch in batches for other in batch[1:4]]))


def test_groups_share_more_attributes_than_uniform_batches(catalogue, store):
    grouped, uniform = (common_pairs(catalogue, store, sampler_of(catalogue, store, fraction=f)) for f in (0.5, 0.0))
    assert grouped > uniform + 0.5


def test_every_epoch_has_other_groups_and_every_product_once_and_is_a_function_of_the_seed(catalogue, store):
    sampler, again = (sampler_of(catalogue, store) for _ in range(2))
    first, second = epoch(sampler), epoch(sampler, 1)
    for batches in (first, second):
        seen = [product for batch in batches for product in batch]
        assert len(seen) == len(set(seen)) == 8 * sampler.steps_per_epoch
    assert [set(batch[:4]) for batch in first] != [set(batch[:4]) for batch in second]
    assert epoch(again, 1) == second, "depends on the epochs sampled before"
    assert epoch(sampler_of(catalogue, store, seed=1)) != first


def test_batches_are_uniform_until_the_warmup_ends_within_an_epoch(catalogue, store):
    uniform = sampler_of(catalogue, store, fraction=0.0)
    steps = uniform.steps_per_epoch
    assert steps > 2
    late = sampler_of(catalogue, store, warmup_steps=steps + 2)
    assert epoch(late) == epoch(uniform)
    assert epoch(late, 1)[:2] == epoch(uniform, 1)[:2]
    assert epoch(late, 1)[2:] != epoch(uniform, 1)[2:]
    seen = [product for batch in epoch(late, 1) for product in batch]
    assert len(seen) == len(set(seen)) == 8 * steps


def test_other_attributes_make_other_groups(catalogue, store, tmp_path):
    """As when a later round's generator describes the items otherwise."""
    products = catalogue.column("product_id")
    place = {product: number for number, product in enumerate(sorted(set(products)))}
    changed = {
        item: f"size: {place[product] % 5}; form: {place[product] % 3}"
        for item, product in zip(catalogue.column("item_id"), products, strict=True)
    }
    assert epoch(sampler_of(catalogue, store_of(changed, tmp_path))) != epoch(sampler_of(catalogue, store))


def test_probable_duplicates_are_kept_apart_at_the_limit(catalogue, tmp_path):
    """Two products of each description: at the limit no group holds both, without one every group does."""
    ids, products = catalogue.column("item_id"), catalogue.column("product_id")
    number = {product: place for place, product in enumerate(sorted(set(products)))}
    twin = {product: place // 2 for product, place in number.items()}
    texts = {
        item: f"own: {twin[product]}; common: {twin[product] % 2}" for item, product in zip(ids, products, strict=True)
    }
    described = store_of(texts, tmp_path)

    def twins(limit: float) -> int:
        sampler = sampler_of(catalogue, described, group_size=2, fraction=0.25, max_similarity=limit)
        found = 0
        for step in range(sampler.steps_per_epoch):
            first, second = (products[pair.query.row] for pair in sampler.batch(step)[:2])
            found += twin[first] == twin[second]
        return found

    assert twins(0.95) == 0
    assert twins(1.0) > 0


def test_groups_by_attributes_need_attributes_that_products_share(catalogue, tmp_path):
    with pytest.raises(ConfigError, match=r"^agcl.batch_grouping.by attributes needs attributes, and this training"):
        sampler_of(catalogue, None)
    alone = {item: f"own: {item}" for item in catalogue.column("item_id")}
    with pytest.raises(CatalogueError, match="no two products share an attribute pair"):
        sampler_of(catalogue, store_of(alone, tmp_path))
    assert sampler_of(catalogue, None, fraction=0.0).batch(0)


def test_the_baseline_has_no_attributes_and_uniform_batches():
    from afmrl_ray.cit.stages.training import declare_baseline

    def fraction(by: str) -> float:
        config = validate({"agcl": {"batch_grouping": {"fraction": 0.5, "by": by}}})
        changes = declare_baseline(config).changes
        return changes.get("agcl.batch_grouping", {"fraction": 0.5})["fraction"]

    assert (fraction("attributes"), fraction("column")) == (0.0, 0.5)
