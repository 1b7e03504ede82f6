"""Evaluation protocols: from a config's item selectors and labels to metrics with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import EvaluationConfig, LabelProtocol, RetrievalProtocol
from afmrl_ray.errors import CatalogueError
from afmrl_ray.retrieval import metrics
from afmrl_ray.retrieval.bootstrap import Value, interval
from afmrl_ray.retrieval.ranking import Ranking, rank_gallery

Embed = Callable[[ItemSelector, bool], tuple[np.ndarray, np.ndarray]]
"""(selector, with attributes) to catalogue rows [N] and embeddings [N, D]."""


@dataclass(frozen=True)
class ProtocolResult:
    """Result of one protocol.

    Attributes:
        record: JSON values: kind, counts, metrics.
        rows: [Q] catalogue rows of the queries, or of the items that were classified.
        per_query: [Q] numbers by metric, for metrics that are means over queries.
        ranking: of a retrieval protocol; none for a label protocol.
    """

    record: dict[str, Any]
    rows: np.ndarray
    per_query: dict[str, np.ndarray]
    ranking: Ranking | None = None


def selections(config: EvaluationConfig) -> list[tuple[ItemSelector, bool]]:
    """Every (selector, with attributes) that the protocols call `Embed` with."""
    found: list[tuple[ItemSelector, bool]] = []
    for protocol in config.protocols:
        if isinstance(protocol, RetrievalProtocol):
            found += [
                (protocol.query, protocol.with_attributes != "none"),
                (protocol.gallery, protocol.with_attributes == "both"),
            ]
        else:
            found += [(protocol.fit, protocol.with_attributes), (protocol.test, protocol.with_attributes)]
    return found


def evaluate(
    config: EvaluationConfig, catalogue: StagedCatalogue, embed: Embed, *, seed: int
) -> dict[str, ProtocolResult]:
    """Results of all protocols by name."""
    samples = config.bootstrap_samples
    return {
        protocol.name: retrieval_protocol(protocol, catalogue, embed, samples=samples, seed=seed)
        if isinstance(protocol, RetrievalProtocol)
        else label_protocol(protocol, catalogue, embed, samples=samples, seed=seed)
        for protocol in config.protocols
    }


def retrieval_protocol(
    protocol: RetrievalProtocol, catalogue: StagedCatalogue, embed: Embed, *, samples: int, seed: int
) -> ProtocolResult:
    """hit@k, recall@k, both variants of mean average precision, and mean reciprocal rank, with bootstrap intervals.

    Raises:
        CatalogueError: see `rank`.
    """
    query_rows, queries = embed(protocol.query, protocol.with_attributes != "none")
    gallery_rows, gallery = embed(protocol.gallery, protocol.with_attributes == "both")
    ranking = rank(
        catalogue,
        protocol.label,
        query_rows,
        queries,
        gallery_rows,
        gallery,
        depth=_depth(protocol),
        within=protocol.within,
    )
    per_query: dict[str, np.ndarray] = {}
    for k in protocol.ks:
        per_query[f"hit@{k}"] = metrics.hit_at_k(ranking, k)
        per_query[f"recall@{k}"] = metrics.recall_at_k(ranking, k)
    per_query[f"map@{protocol.map_k}"] = metrics.average_precision(ranking, protocol.map_k, protocol="standard")
    per_query[f"map_m5@{protocol.map_k}"] = metrics.average_precision(ranking, protocol.map_k, protocol="m5")
    per_query["mrr"] = metrics.reciprocal_rank(ranking)
    values = {name: asdict(interval(value, samples=samples, seed=seed)) for name, value in per_query.items()}
    counts = {"queries": len(ranking.query_rows), "gallery": len(gallery_rows), "without_positive": ranking.excluded}
    return ProtocolResult({"kind": "retrieval", **counts, "metrics": values}, ranking.query_rows, per_query, ranking)


def _depth(protocol: RetrievalProtocol) -> int:
    return max(*protocol.ks, protocol.map_k)


def rank(
    catalogue: StagedCatalogue,
    label: str,
    query_rows: np.ndarray,
    queries: np.ndarray,
    gallery_rows: np.ndarray,
    gallery: np.ndarray,
    *,
    depth: int,
    within: str | None = None,
) -> Ranking:
    """Rank a gallery for queries of the same catalogue; items with an equal, non-null `label` are positives.

    Args:
        label: column of the catalogue.
        query_rows: [Q] catalogue rows.
        queries: [Q, D] embeddings.
        gallery_rows: [N] catalogue rows.
        gallery: [N, D] embeddings.
        depth: number of best items kept for each query.
        within: column whose value gallery items must share with the query to be searched; None = all are.

    Raises:
        CatalogueError: the catalogue has no such column, or no query has a positive.
    """
    labels = np.array(label_codes(catalogue.column(label)))
    groups = None if within is None else np.array(label_codes(catalogue.column(within)))
    order = np.argsort(np.argsort(np.array(catalogue.column("item_id"), dtype=object), kind="stable"))
    ranking = rank_gallery(
        queries,
        gallery,
        query_rows=query_rows,
        gallery_rows=gallery_rows,
        query_labels=labels[query_rows],
        gallery_labels=labels[gallery_rows],
        gallery_order=order[gallery_rows],
        depth=depth,
        query_groups=None if groups is None else groups[query_rows],
        gallery_groups=None if groups is None else groups[gallery_rows],
    )
    if not len(ranking.query_rows):
        raise CatalogueError(
            f"no query has a positive in the gallery by column {label!r}; check the protocol's query and gallery"
        )
    return ranking


def label_codes(values: Sequence[Any]) -> list[int]:
    """Integer codes of labels in order of first appearance; null is -1, which matches no other item."""
    codes: dict[Any, int] = {}
    return [-1 if value is None else codes.setdefault(value, len(codes)) for value in values]


def label_protocol(
    protocol: LabelProtocol, catalogue: StagedCatalogue, embed: Embed, *, samples: int, seed: int
) -> ProtocolResult:
    """Accuracy of a linear probe and of nearest neighbours, with intervals, and k-means clustering of the test items.

    Raises:
        CatalogueError: no class of the test items occurs among the items to fit on, or these have a single class.
    """
    codes = np.array(label_codes(catalogue.column(protocol.label)))
    fit_rows, fit = embed(protocol.fit, protocol.with_attributes)
    test_rows, test = embed(protocol.test, protocol.with_attributes)
    fit, fit_rows = fit[codes[fit_rows] >= 0], fit_rows[codes[fit_rows] >= 0]
    test, test_rows = test[codes[test_rows] >= 0], test_rows[codes[test_rows] >= 0]
    fit_codes, test_codes = codes[fit_rows], codes[test_rows]
    if not np.isin(test_codes, fit_codes).any():
        raise CatalogueError(f"protocol {protocol.name!r}: no class of the `test` items occurs among the `fit` items")
    clusters = metrics.kmeans_labels(test, len(np.unique(test_codes)), seed=seed)
    per_query = {
        "probe_accuracy": metrics.linear_probe_hits(fit, fit_codes, test, test_codes, seed=seed),
        "knn_accuracy": metrics.knn_hits(fit, fit_codes, test, test_codes, k=protocol.neighbours),
    }
    whole = {
        "nmi": metrics.nmi(test_codes, clusters),
        "ari": metrics.ari(test_codes, clusters),
        "purity": metrics.purity(test_codes, clusters),
    }
    values = {name: interval(value, samples=samples, seed=seed) for name, value in per_query.items()}
    values |= {name: Value(float(value)) for name, value in whole.items()}
    record = {
        "kind": "labels",
        "queries": len(test_rows),
        "gallery": len(fit_rows),
        "classes": len(np.unique(test_codes)),
        "metrics": {name: asdict(value) for name, value in values.items()},
    }
    return ProtocolResult(record, test_rows, per_query)


def paired_gain(
    before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray], *, samples: int, seed: int
) -> Value:
    """Mean difference over the queries of both evaluations, with its paired bootstrap interval.

    Args:
        before: catalogue rows [Q] and numbers [Q] of one evaluation.
        after: the same of the other evaluation.
        samples: number of resamples.
        seed: of the resampling.

    Raises:
        ValueError: they have no query in common.
    """
    common, first, second = np.intersect1d(before[0], after[0], assume_unique=True, return_indices=True)
    if not len(common):
        raise ValueError("paired_gain: the two evaluations have no query in common")
    return interval(after[1][second] - before[1][first], samples=samples, seed=seed)
