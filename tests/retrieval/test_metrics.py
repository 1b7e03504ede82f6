"""Metrics equal their definitions, written out."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_ray.errors import CatalogueError
from afmrl_ray.retrieval import metrics
from afmrl_ray.retrieval.ranking import Ranking


def _ranking(ranks: list[list[int]]) -> Ranking:
    counts = np.array([len(r) for r in ranks])
    empty = np.empty((len(ranks), 0))
    return Ranking(
        query_rows=np.arange(len(ranks)),
        excluded=0,
        positives=counts,
        candidates=np.full(len(ranks), 100),
        ranks=np.array([r for row in ranks for r in sorted(row)]),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        top_rows=empty,
        top_scores=empty,
        top_right=empty,
    )


_ranks = st.lists(st.sets(st.integers(0, 20), min_size=1, max_size=8).map(sorted), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(_ranks, st.integers(1, 15))
def test_retrieval_metrics_equal_their_definitions(ranks: list[list[int]], k: int) -> None:
    ranking = _ranking(ranks)
    for index, positives in enumerate(ranks):
        hits = [place in positives for place in range(21)]
        precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(21) if hits[i]]
        inside = sum(hits[:k])
        cut = sum(hits[: min(k, len(positives) + 1)])
        assert metrics.hit_at_k(ranking, k)[index] == (inside > 0)
        assert metrics.recall_at_k(ranking, k)[index] == pytest.approx(inside / len(positives))
        assert metrics.reciprocal_rank(ranking)[index] == pytest.approx(1 / (hits.index(True) + 1))
        gains = [1 / np.log2(i + 2) for i in range(21) if hits[i] and i < k]
        best = [1 / np.log2(i + 2) for i in range(min(k, len(positives)))]
        assert metrics.ndcg_at_k(ranking, k)[index] == pytest.approx(sum(gains) / sum(best))
        standard = sum(precisions[:inside]) / min(k, len(positives))
        assert metrics.average_precision(ranking, k)[index] == pytest.approx(standard)
        m5 = sum(precisions[:cut]) / cut if cut else 0.0
        assert metrics.average_precision(ranking, k, protocol="m5")[index] == pytest.approx(m5)


def test_hit_differs_from_recall_and_m5_from_standard_average_precision() -> None:
    ranking = _ranking([[0, 7, 30, 31], [2]])
    assert metrics.hit_at_k(ranking, 5).tolist() == [1, 1]
    assert metrics.recall_at_k(ranking, 5).tolist() == [0.25, 1]
    assert metrics.mean_average_precision(ranking, 5) == pytest.approx((1 / 4 + 1 / 3) / 2)
    # The second query's class has two items, so its list is cut after two.
    assert metrics.mean_average_precision(ranking, 5, protocol="m5") == pytest.approx((1 + 0) / 2)


_labels = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(-1, 5), min_size=n, max_size=n) for _ in range(2)))
)


def _entropy(labels: list[object]) -> float:
    return -sum(n / len(labels) * math.log(n / len(labels)) for n in Counter(labels).values())


def _nmi(classes: list[int], clusters: list[int]) -> float:
    both = _entropy(list(zip(classes, clusters, strict=True)))
    first, second = _entropy(list(classes)), _entropy(list(clusters))
    return 2 * (first + second - both) / (first + second) if first + second else 1.0


def _ari(classes: list[int], clusters: list[int]) -> float:
    """By counting the pairs of items that are together in classes, in clusters, in both."""
    pairs = [(classes[i] == classes[j], clusters[i] == clusters[j]) for i in range(len(classes)) for j in range(i)]
    in_class, in_cluster, in_both = (sum(x) for x in zip(*[(a, b, a and b) for a, b in pairs], strict=True))
    expected, most = in_class * in_cluster / len(pairs), (in_class + in_cluster) / 2
    return (in_both - expected) / (most - expected) if most != expected else 1.0


@settings(max_examples=200, deadline=None)
@given(_labels)
def test_clustering_metrics_equal_their_definitions(labels: tuple[list[int], list[int]]) -> None:
    classes, clusters = (np.array(x) for x in labels)
    assert metrics.nmi(classes, clusters) == pytest.approx(_nmi(*labels), abs=1e-9)
    if len(classes) > 1:
        assert metrics.ari(classes, clusters) == pytest.approx(_ari(*labels), abs=1e-9)
    majority = sum(max(np.sum(classes[clusters == c] == k) for k in set(classes)) for c in set(clusters))
    assert metrics.purity(classes, clusters) == pytest.approx(majority / len(classes))


def test_clustering_metrics_of_a_small_example() -> None:
    """Classes aaabbb in clusters 001111, by hand."""
    classes, clusters = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1])
    # Pairs together: 6 in classes, 7 in clusters, 4 in both; 15 pairs.
    assert metrics.ari(classes, clusters) == pytest.approx((4 - 6 * 7 / 15) / ((6 + 7) / 2 - 6 * 7 / 15))
    h_class, h_cluster = math.log(2), -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    h_joint = -(1 / 3 * math.log(1 / 3) + 1 / 6 * math.log(1 / 6) + 1 / 2 * math.log(1 / 2))
    assert metrics.nmi(classes, clusters) == pytest.approx(2 * (h_class + h_cluster - h_joint) / (h_class + h_cluster))
    assert metrics.purity(classes, clusters) == pytest.approx(5 / 6)


def _blobs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((4, 8))
    classes = np.arange(n) % 4
    scale = draw.uniform(0.1, 10, (n, 1))
    return (centres[classes] + 0.1 * draw.standard_normal((n, 8))) * scale, classes


def test_probe_neighbours_and_clusters_find_classes_of_embeddings_of_any_length() -> None:
    (fit, fit_classes), (test, test_classes) = _blobs(80, 0), _blobs(40, 1)
    assert metrics.linear_probe_hits(fit, fit_classes, test, test_classes, seed=0).mean() == 1
    assert metrics.knn_hits(fit, fit_classes, test, test_classes, k=5).mean() == 1
    clusters = metrics.kmeans_labels(test, 4, seed=0)
    assert metrics.ari(test_classes, clusters) == 1
    np.testing.assert_array_equal(clusters, metrics.kmeans_labels(test, 4, seed=0))
    wrong = (test_classes + 1) % 4
    assert metrics.linear_probe_hits(fit, fit_classes, test, wrong, seed=0).mean() == 0
    assert metrics.knn_hits(fit[:3], fit_classes[:3], test, test_classes, k=5).mean() <= 0.75


def test_a_probe_with_a_single_class_is_an_error() -> None:
    x, _ = _blobs(8, 0)
    with pytest.raises(CatalogueError, match="single class"):
        metrics.linear_probe_hits(x, np.zeros(8), x, np.zeros(8), seed=0)
