"""Mined negatives against a loop over queries and items."""

from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.agcl.batches import PairSampler
from afmrl_ray.agcl.mined_negatives import mine_negatives, read_negatives, write_negatives
from afmrl_ray.cit.stages.training import declare_agcl, declare_baseline, declare_negatives
from afmrl_ray.config import validate
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.train import AGCLConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.runs import StageName


def case(seed: int, *, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Items of 12 products, some unknown, near the vectors of their products; every third item is a query too."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(-1, 12, 60)
    vectors = draw.normal(size=(13, 6))[labels] + draw.normal(size=(60, 6)) * 0.5 + shift
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = draw.permutation(200)[:60]
    return {
        "queries": vectors[::3],
        "gallery": vectors[10:],
        "query_rows": rows[::3],
        "gallery_rows": rows[10:],
        "query_labels": labels[::3],
        "gallery_labels": labels[10:],
        "gallery_order": draw.permutation(50),
    }


def by_loop(given: dict[str, np.ndarray], count: int, margin: float) -> list[list[int]]:
    found = []
    for query, row, label in zip(given["queries"], given["query_rows"], given["query_labels"], strict=True):
        items = zip(given["gallery"], given["gallery_rows"], given["gallery_labels"], strict=True)
        scored = [(float(query @ vector), int(other), int(code)) for vector, other, code in items if other != row]
        positives = [score for score, _, code in scored if code == label >= 0]
        limit = min(positives, default=-np.inf)
        limit -= (1 - margin) * abs(limit) if positives else 0
        negatives = sorted(
            ((s, r) for s, r, code in scored if s < limit and (code != label or label < 0)), reverse=True
        )
        found.append([other for _, other in negatives[:count]] if positives else [])
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("margin", [1.0, 0.95, 0.6])
def test_negatives_equal_a_plain_loop(seed: int, margin: float) -> None:
    given = case(seed)
    expected = by_loop(given, 5, margin)
    found = mine_negatives(**given, count=5, margin=margin)
    assert found.shape == (20, 5)
    assert [row[row >= 0].tolist() for row in found] == expected
    assert any(expected)
    assert not all(len(negatives) == 5 for negatives in expected)


def test_a_smaller_margin_leaves_out_the_most_similar_items_and_only_those() -> None:
    given = case(0, shift=1.0)
    wide, narrow = (mine_negatives(**given, count=50, margin=margin) for margin in (1.0, 0.8))
    fewer = 0
    for all_below, kept in zip(wide, narrow, strict=True):
        all_below, kept = all_below[all_below >= 0], kept[kept >= 0]
        assert kept.tolist() == all_below[len(all_below) - len(kept) :].tolist()
        fewer += len(kept) < len(all_below)
    assert fewer > 5


def test_a_dissimilar_positive_moves_the_limit_down_as_a_similar_one_does() -> None:
    """With a positive at -0.4 and margin 0.5, negatives are below -0.6."""
    scores = np.array([-0.4, -0.3, -0.5, -0.7, -0.9])
    gallery = np.stack([scores, np.sqrt(1 - scores**2)], axis=1).astype(np.float32)
    found = mine_negatives(
        np.array([[1.0, 0.0]], dtype=np.float32),
        gallery,
        query_rows=np.array([9]),
        gallery_rows=np.arange(5),
        query_labels=np.array([1]),
        gallery_labels=np.array([1, 2, 3, 4, 5]),
        gallery_order=np.arange(5),
        count=3,
        margin=0.5,
    )
    assert found.tolist() == [[3, 4, -1]]


def test_the_order_of_the_gallery_changes_nothing_even_among_equal_scores() -> None:
    given = case(1)
    given["gallery"][20:30] = given["gallery"][20]
    places = np.random.default_rng(0).permutation(50)
    moved = {name: values[places] if name.startswith("gallery") else values for name, values in given.items()}
    first, second = (mine_negatives(**each, count=8, margin=0.95) for each in (given, moved))
    np.testing.assert_array_equal(first, second)


def test_mined_negatives_take_the_place_of_the_catalogues(tiny_catalogue_ref, tmp_path):
    catalogue = tiny_catalogue_ref.open()
    items, products = catalogue.column("item_id"), catalogue.column("product_id")
    rows = catalogue.rows(ItemSelector(split=("train",)))
    others = np.full((len(rows), 3), -1)
    for place, row in enumerate(rows.tolist()):
        others[place, :2] = [other for other in rows.tolist() if products[other] != products[row]][:2]
    path = str(tmp_path / "negatives.parquet")
    write_negatives(path, items, rows, others)
    read = read_negatives(path, items)
    lengths = [None if found is None else len(found) for found in read]
    assert lengths == [2 if row in rows else None for row in range(len(items))]
    config = AGCLConfig(batch_size=6, hard_negatives=2, mined_negatives={"enabled": True})
    sampler = PairSampler(catalogue, config, seed=0, negatives=read)
    place_of = {row: place for place, row in enumerate(rows.tolist())}
    for pair in sampler.batch(0):
        found = {negative.row for negative in pair.negatives}
        assert found == set(others[place_of[pair.query.row], :2].tolist())


def test_mined_negatives_that_nothing_uses_are_refused():
    with pytest.raises(ConfigError, match="hard_negatives is 0; set hard_negatives"):
        validate({"agcl": {"mined_negatives": {"enabled": True}}})


def test_rounds_after_the_first_mine_and_all_other_encoders_do_without(tmp_path):
    config = validate({"agcl": {"mined_negatives": {"enabled": True}, "hard_negatives": 2}})
    first, second = declare_agcl(config, 0), declare_agcl(config, 1)
    assert "negatives" not in first.upstream
    assert first.changes["agcl.hard_negatives"] == 0
    assert second.upstream["negatives"] == StageName("negatives", 1)
    assert declare_negatives(config, 1).upstream["gallery"] == StageName("gallery", 0)
    assert declare_baseline(config).changes["agcl.hard_negatives"] == 0
