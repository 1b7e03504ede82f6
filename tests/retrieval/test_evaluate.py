"""Protocols, baselines and intervals."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import EvaluationConfig, LabelProtocol, RetrievalProtocol
from afmrl_ray.errors import CatalogueError
from afmrl_ray.retrieval.baselines import chance, hit_by_chance, pixel_embeddings
from afmrl_ray.retrieval.bootstrap import interval
from afmrl_ray.retrieval.evaluate import (
    evaluate,
    label_codes,
    label_protocol,
    paired_gain,
    retrieval_protocol,
    selections,
)


@pytest.fixture(scope="module")
def catalogue(tiny_catalogue_ref):
    return tiny_catalogue_ref.open()


def perfect(catalogue, column: str, noise: float = 0.01):
    """Embeddings that are nearly one-hot in a column's value, and the list of calls that were made for them."""
    codes = np.array(label_codes(catalogue.column(column)))
    base = np.eye(codes.max() + 1, dtype=np.float32)[codes]
    base += np.random.default_rng(0).normal(0, noise, base.shape).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    calls = []

    def embed(selector: ItemSelector, with_attributes: bool):
        calls.append((selector, with_attributes))
        rows = catalogue.rows(selector)
        return rows, base[rows]

    return embed, calls


def test_embeddings_of_the_product_give_perfect_retrieval(catalogue):
    embed, _ = perfect(catalogue, "product_id")
    config = EvaluationConfig(protocols=(RetrievalProtocol(name="fine"),), bootstrap_samples=20)
    fine = evaluate(config, catalogue, embed, seed=0)["fine"]
    metrics = fine.record["metrics"]
    assert metrics["hit@1"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert metrics["recall@1"]["mean"] == pytest.approx(0.5)
    assert metrics["recall@5"]["mean"] == metrics["map@10"]["mean"] == metrics["mrr"]["mean"] == 1.0
    assert fine.record["queries"] == len(fine.ranking.query_rows) == len(fine.rows) == 12
    assert fine.record["gallery"] == 24


@pytest.mark.parametrize(
    ("with_attributes", "expected"), [("none", (False, False)), ("query", (True, False)), ("both", (True, True))]
)
def test_query_and_gallery_are_embedded_with_attributes_as_the_protocol_says(catalogue, with_attributes, expected):
    embed, calls = perfect(catalogue, "product_id")
    protocol = RetrievalProtocol(name="fine", with_attributes=with_attributes)
    retrieval_protocol(protocol, catalogue, embed, samples=5, seed=0)
    assert [(selector.role, asked) for selector, asked in calls] == [("query", expected[0]), ("gallery", expected[1])]


def test_selections_are_exactly_what_the_protocols_embed(catalogue):
    embed, calls = perfect(catalogue, "family_id")
    test = ItemSelector(split=("train",))
    labels = LabelProtocol(name="f", label="family_id", fit=test, test=test, with_attributes=False)
    fine = RetrievalProtocol(name="fine", with_attributes="query")
    config = EvaluationConfig(protocols=(fine, labels), bootstrap_samples=5)
    evaluate(config, catalogue, embed, seed=0)
    assert calls == selections(config)


def test_embeddings_of_the_family_give_perfect_clusters_and_classification(catalogue):
    embed, _ = perfect(catalogue, "family_id")
    test = ItemSelector(split=("train",))
    protocol = LabelProtocol(name="f", label="family_id", fit=test, test=test)
    found = label_protocol(protocol, catalogue, embed, samples=5, seed=0)
    result = found.record
    assert {name: len(values) for name, values in found.per_query.items()} == {
        "probe_accuracy": result["queries"],
        "knn_accuracy": result["queries"],
    }
    assert {name: value["mean"] for name, value in result["metrics"].items()} == pytest.approx(
        {"probe_accuracy": 1.0, "knn_accuracy": 1.0, "nmi": 1.0, "ari": 1.0, "purity": 1.0}
    )
    assert result["classes"] == len({catalogue.item(int(row)).extra["family_id"] for row in catalogue.rows(test)})


def test_disjoint_classes_of_fit_and_test_items_are_an_error(catalogue):
    embed, _ = perfect(catalogue, "family_id")
    protocol = LabelProtocol(name="f", label="family_id", fit=ItemSelector(split=("train",)), test=ItemSelector())
    with pytest.raises(CatalogueError, match="no class of the `test` items occurs among the `fit` items"):
        label_protocol(protocol, catalogue, embed, samples=5, seed=0)


def test_null_labels_match_no_other_item():
    assert label_codes(["b", None, "a", "b", None]) == [0, -1, 1, 0, -1]


def test_the_interval_covers_the_true_mean_as_often_as_its_level():
    draw = np.random.default_rng(0)
    inside = 0
    for seed in range(120):
        value = interval((draw.random(80) < 0.3).astype(float), samples=300, seed=seed)
        inside += value.low <= 0.3 <= value.high
    assert inside / 120 > 0.88


def test_the_interval_equals_a_bootstrap_written_out():
    values = (np.random.default_rng(3).random(150) < 0.4).astype(float)
    draw = np.random.default_rng(7)
    means = [values[draw.integers(150, size=150)].mean() for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    found = interval(values, samples=2000, seed=7)
    # Both resample the same numbers, so they differ by resampling noise at most: 0.001 is a seventh of an item.
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), abs=1e-3)
    assert interval(values, samples=2000, seed=8) != found


def test_a_single_query_and_equal_queries_have_an_interval_without_width():
    for values in (np.array([0.25]), np.full(9, 0.25)):
        assert asdict(interval(values, samples=20, seed=0)) == {"mean": 0.25, "low": 0.25, "high": 0.25}


def test_a_paired_gain_covers_common_queries_and_is_narrower_than_an_unpaired_one():
    draw = np.random.default_rng(0)
    rows, before = np.arange(400), (draw.random(400) < 0.5).astype(float)
    after = np.where(draw.random(400) < 0.05, 1.0, before)
    shuffled = draw.permutation(400)
    gain = paired_gain((rows, before), (rows[shuffled], after[shuffled]), samples=300, seed=0)
    assert gain.mean == pytest.approx((after - before).mean())
    assert 0 < gain.low < gain.mean < gain.high
    apart = interval(after, samples=300, seed=0)
    assert gain.high - gain.low < 0.5 * (apart.high - apart.low)
    partly = paired_gain((rows[:10], before[:10]), (rows[5:], after[5:]), samples=5, seed=0)
    assert partly.mean == pytest.approx((after - before)[5:10].mean())
    with pytest.raises(ValueError, match="no query in common"):
        paired_gain((rows[:3], before[:3]), (rows[3:], after[3:]), samples=5, seed=0)


def test_chance_equals_the_mean_over_random_orders():
    draw = np.random.default_rng(0)
    hits = [np.isin(draw.permutation(20)[:5], [0, 1, 2]).any() for _ in range(4000)]
    found = hit_by_chance(np.array([3, 3]), np.array([20, 5]), 5)
    assert found[0] == pytest.approx(np.mean(hits), abs=0.03)
    # 1 - C(17, 5) / C(20, 5)
    assert found[0] == pytest.approx(1 - math.comb(17, 5) / math.comb(20, 5))
    assert found[1] == 1.0
    assert hit_by_chance(np.array([3]), np.array([5]), 3) == pytest.approx([1.0])
    assert hit_by_chance(np.array([1, 2]), np.array([400, 4]), 9)[1] == 1.0, "more draws than items"
    assert hit_by_chance(np.array([1]), np.array([400]), 1) == pytest.approx([1 / 400])


def test_chance_of_a_protocol_counts_its_candidates(catalogue):
    embed, _ = perfect(catalogue, "product_id")
    protocol = RetrievalProtocol(name="fine")
    values = chance(protocol, retrieval_protocol(protocol, catalogue, embed, samples=5, seed=0).ranking)
    assert values["recall@5"]["mean"] == pytest.approx(5 / 24)
    assert values["hit@1"]["mean"] == pytest.approx(2 / 24)


def test_pixel_embeddings_have_unit_length_and_differ_between_images(catalogue):
    everything = pixel_embeddings(catalogue)
    assert everything.shape == (len(catalogue), 192)
    embeddings = everything[:6]
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert (embeddings @ embeddings.T)[np.triu_indices(6, 1)].max() < 0.9999
