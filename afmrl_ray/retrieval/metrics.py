"""Retrieval, clustering and classification metrics as pure functions of ranks, labels and embeddings.

Retrieval metrics return one number per query, so that intervals can be taken over queries. hit@k and recall@k differ as
soon as a query has several positives; the paper's "Recall@k" behaves like hit@k.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import sparse

from afmrl_ray.errors import CatalogueError
from afmrl_ray.retrieval.ranking import Ranking

APProtocol = Literal["standard", "m5"]


def hit_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """[Q] 1.0 if any positive is in the top k."""
    return (ranking.ranks[ranking.offsets[:-1]] < k).astype(np.float64)


def recall_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """[Q] share of the query's positives that are in the top k."""
    return np.add.reduceat(ranking.ranks < k, ranking.offsets[:-1], dtype=np.int64) / ranking.positives


def reciprocal_rank(ranking: Ranking) -> np.ndarray:
    """[Q] one over the place (from 1) of the best positive, at any depth."""
    return 1.0 / (ranking.ranks[ranking.offsets[:-1]] + 1)


def ndcg_at_k(ranking: Ranking, k: int) -> np.ndarray:
    """[Q] normalised discounted cumulative gain at k: every positive gains 1, at place p (from 1) over log2(p + 1).

    1.0 where as many positives as there are, or k of them, stand first.
    """
    gain = np.where(ranking.ranks < k, 1.0 / np.log2(ranking.ranks + 2.0), 0.0)
    ideal = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))
    return np.add.reduceat(gain, ranking.offsets[:-1]) / ideal[np.minimum(ranking.positives, k) - 1]


def average_precision(ranking: Ranking, k: int, *, protocol: APProtocol = "standard") -> np.ndarray:
    """[Q] average precision at k: the sum of the precisions at the hits inside the top k, divided.

    `standard` divides by min(positives, k). `m5` follows the code published with M5Product: it divides by the number of
    hits inside the top k, after cutting k to the size of the query's class (its own item counted, items outside the
    gallery not), so AP@1 is precision at 1 and AP@5 may exceed AP@1. The two differ by tens of points.
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
    """Normalised mutual information, 2 I(U; V) / (H(U) + H(V)): normalised by the arithmetic mean of the entropies.

    Args:
        classes: [N] integer labels.
        clusters: [N] integer labels.
    """
    joint, row, column = _contingency(classes, clusters)
    total = joint.data.sum()
    expected = np.log(row[joint.row] / total) + np.log(column[joint.col] / total)
    share = joint.data / total
    information = float((share * (np.log(share) - expected)).sum())
    entropy = sum(float(-(n / total * np.log(n / total)).sum()) for n in (row, column))
    return max(0.0, 2 * information / entropy) if entropy > 0 else 1.0


def ari(classes: np.ndarray, clusters: np.ndarray) -> float:
    """Adjusted Rand index, (RI - E) / (max - E) over pairs of items; labels [N] as in `nmi`."""
    joint, row, column = _contingency(classes, clusters)
    together, in_class, in_cluster = (float((n * (n - 1.0)).sum()) / 2 for n in (joint.data, row, column))
    pairs = joint.data.sum() * (joint.data.sum() - 1.0) / 2
    expected = in_class * in_cluster / pairs if pairs else 0.0
    most = (in_class + in_cluster) / 2
    return (together - expected) / (most - expected) if most != expected else 1.0


def purity(classes: np.ndarray, clusters: np.ndarray) -> float:
    """Share of items that belong to the largest class of their cluster; labels [N] as in `nmi`."""
    joint, _, _ = _contingency(classes, clusters)
    return float(joint.tocsc().max(axis=0).sum() / joint.data.sum())


def _contingency(classes: np.ndarray, clusters: np.ndarray) -> tuple[sparse.coo_array, np.ndarray, np.ndarray]:
    """Counts of (class, cluster) without empty cells, and counts of each class and of each cluster."""
    _, u = np.unique(classes, return_inverse=True)
    _, v = np.unique(clusters, return_inverse=True)
    joint = sparse.coo_array((np.ones(len(u), dtype=np.int64), (u, v)))
    joint.sum_duplicates()
    return joint, np.bincount(u), np.bincount(v)


def kmeans_labels(embeddings: np.ndarray, k: int, *, seed: int) -> np.ndarray:
    """[N] clusters of embeddings [N, D] by k-means on unit length, the best of 10 starts."""
    from sklearn.cluster import KMeans

    return KMeans(n_clusters=k, n_init=10, random_state=seed).fit_predict(_unit(embeddings))


def linear_probe_hits(
    fit: np.ndarray, fit_classes: np.ndarray, test: np.ndarray, test_classes: np.ndarray, *, seed: int
) -> np.ndarray:
    """[M] 1.0 where a logistic regression fitted to `fit` [N, D], features standardised, is right about `test` [M, D].

    Raises:
        CatalogueError: the fit side has a single class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(fit_classes)) < 2:
        raise CatalogueError("linear probe: the fit side has a single class; choose another label or side")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed))
    probe.fit(_unit(fit), fit_classes)
    return (probe.predict(_unit(test)) == test_classes).astype(np.float64)


def knn_hits(
    fit: np.ndarray, fit_classes: np.ndarray, test: np.ndarray, test_classes: np.ndarray, *, k: int = 5
) -> np.ndarray:
    """[M] 1.0 where a vote of the k nearest of `fit` [N, D] by cosine is right; ties go to the smaller class."""
    from sklearn.neighbors import KNeighborsClassifier

    neighbours = KNeighborsClassifier(n_neighbors=min(k, len(fit)), algorithm="brute", metric="cosine")
    neighbours.fit(_unit(fit), fit_classes)
    return (neighbours.predict(_unit(test)) == test_classes).astype(np.float64)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
