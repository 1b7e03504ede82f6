"""Retrieval, clustering and classification metrics as pure functions of ranks, labels and embeddings.

Retrieval metrics return one number per query, so that intervals over queries can be computed. hit@k and recall@k differ
for queries with several positives; the paper's "Recall@k" behaves like hit@k.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from afmrl_ray.errors import CatalogueError
from afmrl_ray.retrieval.ranking import Ranking

APProtocol = Literal["standard", "m5"]


def hit_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """[Q] 1.0 if any positive is in the top k."""
    return (ranking.ranks[ranking.offsets[:-1]] < k).astype(np.float64)


def recall_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """[Q] fraction of the query's positives that are in the top k."""
    return np.add.reduceat(ranking.ranks < k, ranking.offsets[:-1], dtype=np.int64) / ranking.positives


def reciprocal_rank(ranking: Ranking) -> np.ndarray:
    """[Q] reciprocal of the rank (from 1) of the best positive, at any depth."""
    return 1.0 / (ranking.ranks[ranking.offsets[:-1]] + 1)


def ndcg_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """[Q] normalised discounted cumulative gain at k: relevance 1 for positives, discount log2(rank + 1)."""
    gain = np.where(ranking.ranks < k, 1.0 / np.log2(ranking.ranks + 2.0), 0.0)
    ideal = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))
    return np.add.reduceat(gain, ranking.offsets[:-1]) / ideal[np.minimum(ranking.positives, k) - 1]


def average_precision(ranking: Ranking, k: int, *, protocol: APProtocol = "standard") -> np.ndarray:
    """[Q] average precision at k: the sum of the precisions at the positives in the top k, divided by a count.

    `standard` divides by min(positives, k). `m5` follows the code published with M5Product: it divides by the number of
    positives in the top k, after limiting k to the size of the query's class (its own item counted, items outside the
    gallery not counted), so AP@1 is precision at 1 and AP@5 may exceed AP@1. The two differ by tens of points.
    """
    place = np.arange(len(ranking.ranks)) - np.repeat(ranking.offsets[:-1], ranking.positives) + 1
    cut = np.full(len(ranking.positives), k) if protocol == "standard" else np.minimum(k, ranking.positives + 1)
    hit = ranking.ranks < np.repeat(cut, ranking.positives)
    total = np.add.reduceat(np.where(hit, place / (ranking.ranks + 1), 0.0), ranking.offsets[:-1])
    if protocol == "standard":
        return total / np.minimum(ranking.positives, k)
    return total / np.maximum(np.add.reduceat(hit, ranking.offsets[:-1], dtype=np.int64), 1)


def mean_average_precision(ranking: Ranking, k: int, *, protocol: APProtocol = "standard") -> float:
    """Mean of `average_precision` over queries."""
    return float(average_precision(ranking, k, protocol=protocol).mean())


def nmi(classes: np.ndarray, clusters: np.ndarray) -> float:
    """Normalised mutual information, normalised by the arithmetic mean of the entropies (scikit-learn).

    Args:
        classes: [N] integer labels.
        clusters: [N] integer labels.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(classes, clusters))


def ari(classes: np.ndarray, clusters: np.ndarray) -> float:
    """Adjusted Rand index (scikit-learn); labels [N] as in `nmi`."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(classes, clusters))


def purity(classes: np.ndarray, clusters: np.ndarray) -> float:
    """Fraction of items that belong to the largest class of their cluster; labels [N] as in `nmi`."""
    from sklearn.metrics.cluster import contingency_matrix

    return float(contingency_matrix(classes, clusters, sparse=True).max(axis=0).sum() / len(classes))


def kmeans_labels(embeddings: np.ndarray, k: int, *, seed: int) -> np.ndarray:
    """[N] cluster of each of N embeddings [N, D], scaled to unit length, by k-means (best of 10 initialisations)."""
    from sklearn.cluster import KMeans

    return KMeans(n_clusters=k, n_init=10, random_state=seed).fit_predict(_unit(embeddings))


def linear_probe_hits(
    fit: np.ndarray, fit_classes: np.ndarray, test: np.ndarray, test_classes: np.ndarray, *, seed: int
) -> np.ndarray:
    """[M] 1.0 where a logistic regression on standardised features of `fit` [N, D] classifies `test` [M, D] correctly.

    Raises:
        CatalogueError: the items to fit on have a single class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(fit_classes)) < 2:
        raise CatalogueError(
            "linear probe: the items to fit on have a single class; choose another label or another `fit` selector"
        )
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))
    probe.fit(_unit(fit), fit_classes)
    return (probe.predict(_unit(test)) == test_classes).astype(np.float64)


def knn_hits(
    fit: np.ndarray, fit_classes: np.ndarray, test: np.ndarray, test_classes: np.ndarray, *, k: int = 5
) -> np.ndarray:
    """[M] 1.0 where the majority of the k nearest of `fit` [N, D] by cosine is correct; the smaller class wins ties."""
    from sklearn.neighbors import KNeighborsClassifier

    neighbours = KNeighborsClassifier(n_neighbors=min(k, len(fit)), algorithm="brute", metric="cosine")
    neighbours.fit(_unit(fit), fit_classes)
    return (neighbours.predict(_unit(test)) == test_classes).astype(np.float64)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
