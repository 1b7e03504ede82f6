from __future__ import annotations

import pytest

from afmrl_ray.agcl.batches import PairSampler
from afmrl_ray.config.catalogue import SideConfig
from afmrl_ray.config.train import PairConfig
from afmrl_ray.errors import CatalogueError, ConfigError

TRAIN = (PairConfig(),)


@pytest.fixture(scope="module")
def catalogue(tiny_catalogue_ref):
    return tiny_catalogue_ref.open()


def test_a_batch_is_a_function_of_seed_and_step(catalogue):
    first = PairSampler(catalogue, TRAIN, batch_size=6, seed=3)
    again = PairSampler(catalogue, TRAIN, batch_size=6, seed=3)
    for step in (7, 0, 3):
        assert first.batch(step) == again.batch(step)
    assert first.batch(0) != PairSampler(catalogue, TRAIN, batch_size=6, seed=4).batch(0)
    assert first.batch(0) != first.batch(first.steps_per_epoch)


def test_pairs_are_two_listings_of_one_product_and_a_batch_holds_a_product_once(catalogue):
    sampler = PairSampler(catalogue, TRAIN, batch_size=6, seed=0)
    products, splits = catalogue.column("product_id"), catalogue.column("split")
    for step in range(10):
        batch = sampler.batch(step)
        assert len({pair.product for pair in batch}) == 6
        for pair in batch:
            assert pair.query != pair.positive
            assert products[pair.query] == products[pair.positive]
            assert splits[pair.query] == splits[pair.positive] == "train"


def test_an_epoch_visits_every_product_at_most_once_and_all_but_a_remainder(catalogue):
    sampler = PairSampler(catalogue, TRAIN, batch_size=6, seed=0)
    seen = [pair.product for step in range(sampler.steps_per_epoch) for pair in sampler.batch(step)]
    products = {
        p for p, s in zip(catalogue.column("product_id"), catalogue.column("split"), strict=True) if s == "train"
    }
    assert len(seen) == len(set(seen)) == len(products) // 6 * 6


def test_sources_take_their_sides_and_their_share(catalogue):
    queries = SideConfig(split=("test",), role="query")
    gallery = SideConfig(split=("test",), role="gallery")
    sources = (PairConfig(query=queries, positive=gallery, weight=3.0), PairConfig(query=gallery, positive=gallery))
    sampler = PairSampler(catalogue, sources, batch_size=4, seed=0)
    roles = catalogue.column("role")
    pairs = [pair for step in range(100) for pair in sampler.batch(step)]
    for pair in pairs:
        assert roles[pair.query] == ("query" if pair.source == 0 else "gallery")
        assert roles[pair.positive] == "gallery"
    assert sum(pair.source == 0 for pair in pairs) / len(pairs) == pytest.approx(0.75, abs=0.08)


def test_impossible_batches_are_refused(catalogue):
    with pytest.raises(ConfigError, match=r"agcl.batch_size 500 exceeds the \d+ products"):
        PairSampler(catalogue, TRAIN, batch_size=500, seed=0)
    query = SideConfig(split=("test",), role="query")
    with pytest.raises(CatalogueError, match="nothing is positive"):
        PairSampler(catalogue, (PairConfig(query=query, positive=query),), batch_size=2, seed=0)
