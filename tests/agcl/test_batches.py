from __future__ import annotations

import pytest

from afmrl_ray.agcl.batches import PairSampler
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.train import AGCLConfig, PairConfig
from afmrl_ray.errors import CatalogueError, ConfigError


def sampler_of(catalogue, seed: int = 0, **agcl) -> PairSampler:
    return PairSampler(catalogue, AGCLConfig(**{"batch_size": 6, **agcl}), seed=seed)


@pytest.fixture(scope="module")
def catalogue(tiny_catalogue_ref):
    return tiny_catalogue_ref.open()


def test_a_batch_is_a_function_of_seed_and_step(catalogue):
    first = sampler_of(catalogue, seed=3)
    again = sampler_of(catalogue, seed=3)
    for step in (7, 0, 3):
        assert first.batch(step) == again.batch(step)
    assert first.batch(0) != sampler_of(catalogue, seed=4).batch(0)
    assert first.batch(0) != first.batch(first.steps_per_epoch)


def test_pairs_are_two_items_of_one_product_and_a_batch_holds_a_product_once(catalogue):
    sampler = sampler_of(catalogue)
    products, splits = catalogue.column("product_id"), catalogue.column("split")
    for step in range(10):
        batch = sampler.batch(step)
        assert len({pair.query.product for pair in batch}) == 6
        for pair in batch:
            (positive,) = pair.positives
            assert pair.query.row != positive.row
            assert products[pair.query.row] == products[positive.row]
            assert splits[pair.query.row] == splits[positive.row] == "train"


def test_an_epoch_visits_every_product_at_most_once_and_all_but_a_remainder(catalogue):
    sampler = sampler_of(catalogue)
    seen = [pair.query.product for step in range(sampler.steps_per_epoch) for pair in sampler.batch(step)]
    products = {
        p for p, s in zip(catalogue.column("product_id"), catalogue.column("split"), strict=True) if s == "train"
    }
    assert len(seen) == len(set(seen)) == len(products) // 6 * 6


def test_pairs_come_from_their_source_in_proportion_to_its_weight(catalogue):
    queries = ItemSelector(split=("test",), role="query")
    gallery = ItemSelector(split=("test",), role="gallery")
    sources = (PairConfig(query=queries, positive=gallery, weight=3.0), PairConfig(query=gallery, positive=gallery))
    sampler = sampler_of(catalogue, pairs=sources, batch_size=4)
    roles = catalogue.column("role")
    pairs = [pair for step in range(100) for pair in sampler.batch(step)]
    for pair in pairs:
        assert pair.query.selector in (queries, gallery)
        assert roles[pair.query.row] == ("query" if pair.query.selector == queries else "gallery")
        assert roles[pair.positives[0].row] == "gallery"
        assert pair.positives[0].selector == gallery
    assert sum(pair.query.selector == queries for pair in pairs) / len(pairs) == pytest.approx(0.75, abs=0.08)


def test_impossible_batches_are_refused(catalogue):
    with pytest.raises(ConfigError, match=r"agcl.batch_size 500 exceeds the \d+ products"):
        sampler_of(catalogue, batch_size=500)
    query = ItemSelector(split=("test",), role="query")
    with pytest.raises(CatalogueError, match="nothing is positive"):
        sampler_of(catalogue, pairs=(PairConfig(query=query, positive=query),), batch_size=2)


def test_the_grouped_fraction_is_made_of_groups_and_an_epoch_still_visits_every_product_once(catalogue):
    families = dict(zip(catalogue.column("product_id"), catalogue.column("family_id"), strict=True))
    products = catalogue.column("product_id")

    grouped = sampler_of(catalogue, batch_grouping={"fraction": 0.5, "column": "family_id"}, batch_size=8)
    members = [families[products[pair.query.row]] for pair in grouped.batch(0)]
    assert len(set(members[:4])) == 1, "half of eight is one family"
    uniform = [families[products[pair.query.row]] for pair in sampler_of(catalogue, batch_size=8).batch(0)]
    assert len(set(uniform[:4])) > 1
    seen = [pair.query.product for step in range(grouped.steps_per_epoch) for pair in grouped.batch(step)]
    assert len(seen) == len(set(seen)) == grouped.steps_per_epoch * 8
    again = sampler_of(catalogue, batch_grouping={"fraction": 0.5, "column": "family_id"}, batch_size=8)
    assert again.batch(grouped.steps_per_epoch + 1) == grouped.batch(grouped.steps_per_epoch + 1)
    with pytest.raises(CatalogueError, match=r"agcl.batch_grouping.column 'item_id': no two products share a value"):
        sampler_of(catalogue, batch_grouping={"fraction": 0.5, "column": "item_id"})


def test_several_positives_are_different_items_where_there_are_enough(catalogue):
    products = catalogue.column("product_id")
    for pair in sampler_of(catalogue, positives_per_query=2).batch(0):
        rows = [item.row for item in pair.positives]
        assert len(rows) == 2
        assert pair.query.row not in rows
        assert {products[row] for row in rows} == {products[pair.query.row]}


def test_hard_negatives_are_known_items_of_other_products(hard_negatives_catalogue_ref, caplog):
    catalogue = hard_negatives_catalogue_ref.open()
    sampler = sampler_of(catalogue, hard_negatives=2)
    items, products, wanted = (catalogue.column(name) for name in ("item_id", "product_id", "negatives"))
    for pair in sampler.batch(1):
        assert len(pair.negatives) == (2 if wanted[pair.query.row] else 0)
        for item in pair.negatives:
            assert items[item.row] in wanted[pair.query.row]
            assert products[item.row] != products[pair.query.row]
    listed = sum(bool(names) for names in wanted)
    assert f"left out {listed} items that are not in the catalogue and {listed} of the row's own product" in caplog.text


def test_a_fraction_of_the_products_is_drawn_by_the_seed_and_nested(catalogue):
    def drawn(fraction: float, seed: int = 0) -> set[int]:
        sampler = sampler_of(catalogue, seed=seed, train_fraction=fraction, batch_size=4)
        pairs = [pair for step in range(40) for pair in sampler.batch(step)]
        products = catalogue.column("product_id")
        return {products[pair.query.row] for pair in pairs}

    everything, half, third = drawn(1.0), drawn(0.5), drawn(0.3)
    assert len(half) == round(0.5 * len(everything))
    assert third < half < everything
    assert drawn(0.5, seed=1) != half


def test_a_fraction_too_small_for_a_batch_is_an_error_that_names_both_settings(catalogue):
    with pytest.raises(ConfigError, match=r"agcl.batch_size 6 exceeds the \d products .* agcl.train_fraction 0.1"):
        sampler_of(catalogue, train_fraction=0.1)


def test_attributes_are_dropped_with_the_probability_of_query_and_positive(catalogue):
    def kept(**dropout: float) -> tuple[float, float]:
        sampler = sampler_of(catalogue, attribute_dropout=dropout)
        pairs = [pair for step in range(60) for pair in sampler.batch(step)]
        queries = sum(pair.query.with_attributes for pair in pairs) / len(pairs)
        return queries, sum(pair.positives[0].with_attributes for pair in pairs) / len(pairs)

    assert kept(query=0.0, positive=1.0) == (1.0, 0.0)
    assert kept(query=0.25, positive=0.5) == pytest.approx((0.75, 0.5), abs=0.08)
