from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import EvaluationConfig, LabelProtocol, RetrievalProtocol
from afmrl_ray.errors import CatalogueError
from afmrl_ray.retrieval.baselines import chance, hit_by_chance, pixel_embeddings
from afmrl_ray.retrieval.evaluate import (
    evaluate,
    interval,
    label_codes,
    label_protocol,
    paired_gain,
    retrieval_protocol,
)


@pytest.fixture(scope="module")
def catalogue(tiny_catalogue_ref):
    return tiny_catalogue_ref.open()


def perfect(catalogue, column: str, noise: float = 0.01):
    """Embeddings that are nearly one-hot in a column's value; records what it was asked for."""
    codes = np.array(label_codes(catalogue.column(column)))
    base = np.eye(codes.max() + 1, dtype=np.float32)[codes]
    base += np.random.default_rng(0).normal(0, noise, base.shape).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    asked = []

    def embed(side: ItemSelector, with_attributes: bool):
        asked.append((side.role, with_attributes))
        rows = catalogue.rows(side)
        return rows, base[rows]

    return embed, asked


def test_an_encoder_that_knows_the_product_is_right_everywhere(catalogue):
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
    ("with_attributes", "sides"), [("none", (False, False)), ("query", (True, False)), ("both", (True, True))]
)
def test_enrichment_is_asked_for_on_the_sides_that_the_protocol_names(catalogue, with_attributes, sides):
    embed, asked = perfect(catalogue, "product_id")
    protocol = RetrievalProtocol(name="fine", with_attributes=with_attributes)
    retrieval_protocol(protocol, catalogue, embed, samples=5, seed=0)
    assert asked == [("query", sides[0]), ("gallery", sides[1])]


def test_an_encoder_that_knows_the_family_clusters_by_it(catalogue):
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


def test_classes_that_never_meet_are_told(catalogue):
    embed, _ = perfect(catalogue, "family_id")
    protocol = LabelProtocol(name="f", label="family_id", fit=ItemSelector(split=("train",)), test=ItemSelector())
    with pytest.raises(CatalogueError, match="no class of the test side occurs on the fit side"):
        label_protocol(protocol, catalogue, embed, samples=5, seed=0)


def test_null_labels_equal_nothing():
    assert label_codes(["b", None, "a", "b", None]) == [0, -1, 1, 0, -1]


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    inside = 0
    for seed in range(120):
        value = interval((draw.random(80) < 0.3).astype(float), samples=300, seed=seed)
        inside += value.low <= 0.3 <= value.high
    assert inside / 120 > 0.88


def test_a_paired_gain_is_that_of_common_queries_and_surer_than_its_parts():
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


def test_chance_is_what_random_orders_give():
    draw = np.random.default_rng(0)
    hits = [np.isin(draw.permutation(20)[:5], [0, 1, 2]).any() for _ in range(4000)]
    assert hit_by_chance(3, 20, 5) == pytest.approx(np.mean(hits), abs=0.03)
    assert hit_by_chance(3, 5, 3) == 1.0
    assert hit_by_chance(1, 400, 1) == pytest.approx(1 / 400)


def test_chance_of_a_protocol_counts_its_candidates(catalogue):
    embed, _ = perfect(catalogue, "product_id")
    protocol = RetrievalProtocol(name="fine")
    values = chance(protocol, retrieval_protocol(protocol, catalogue, embed, samples=5, seed=0).ranking)
    assert values["recall@5"]["mean"] == pytest.approx(5 / 24)
    assert values["hit@1"]["mean"] == pytest.approx(2 / 24)


def test_pixels_tell_images_apart(catalogue):
    everything = pixel_embeddings(catalogue)
    assert everything.shape == (len(catalogue), 192)
    embeddings = everything[:6]
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert (embeddings @ embeddings.T)[np.triu_indices(6, 1)].max() < 0.9999
