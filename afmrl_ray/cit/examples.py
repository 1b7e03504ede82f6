"""Queries that the report shows: a random sample, and those with the worst results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.retrieval.evaluate import Embed, label_codes
from afmrl_ray.retrieval.ranking import Ranking

DRAWN = 24
WORST = 10
HITS_SHOWN = 5

Texts = Callable[[str], str]
"""Attribute text by item id."""


def examples(ranking: Ranking, catalogue: StagedCatalogue, texts: Texts, *, seed: int) -> list[dict[str, Any]]:
    """A random sample of queries with their top hits, as JSON values."""
    count = min(DRAWN, len(ranking.query_rows))
    chosen = np.sort(np.random.default_rng(seed).choice(len(ranking.query_rows), size=count, replace=False))
    return [_example(ranking, index, catalogue, texts) for index in chosen.tolist()]


def failures(
    ranking: Ranking, catalogue: StagedCatalogue, texts: Texts, protocol: RetrievalProtocol, embed: Embed
) -> list[dict[str, Any]]:
    """The queries whose best positive has the worst rank, worst first, each with that positive, as JSON values.

    Queries whose first hit is a positive are left out.

    Args:
        ranking: of `protocol`, with the embeddings that `embed` gives.
        embed: see `retrieval.evaluate.Embed`.
    """
    first = ranking.ranks[ranking.offsets[:-1]]
    worst = [index for index in np.argsort(-first, kind="stable")[:WORST].tolist() if first[index] > 0]
    labels = np.array(label_codes(catalogue.column(protocol.label)))
    query_rows, queries = embed(protocol.query, protocol.with_attributes != "none")
    gallery_rows, gallery = embed(protocol.gallery, protocol.with_attributes == "both")
    found = []
    for index in worst:
        query = int(ranking.query_rows[index])
        positives = np.flatnonzero((labels[gallery_rows] == labels[query]) & (gallery_rows != query))
        scores = gallery[positives] @ queries[query_rows == query][0]
        item = catalogue.item(int(gallery_rows[positives[np.argmax(scores)]]))
        found.append(
            {
                **_example(ranking, index, catalogue, texts),
                "rank": int(first[index]) + 1,
                "missed": {"row": item.row, "item_id": item.item_id, "attributes": texts(item.item_id)},
            }
        )
    return found


def _example(ranking: Ranking, index: int, catalogue: StagedCatalogue, texts: Texts) -> dict[str, Any]:
    item = catalogue.item(int(ranking.query_rows[index]))
    hits = zip(ranking.top_rows[index], ranking.top_scores[index], ranking.top_right[index], strict=True)
    return {
        "query_row": item.row,
        "item_id": item.item_id,
        "title": item.title or "",
        "attributes": texts(item.item_id),
        "hits": [
            {"row": int(row), "item_id": catalogue.item(int(row)).item_id, "score": float(score), "right": bool(right)}
            for row, score, right in list(hits)[:HITS_SHOWN]
            if row >= 0
        ],
    }
