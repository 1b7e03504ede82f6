"""Hard negatives of training items, mined from the gallery of an earlier encoder with a positive-aware margin.

Sources: Xiong et al. 2021 (ANCE, arXiv 2007.00808) for negatives from the gallery of an earlier checkpoint; Moreira et
al. 2024 (NV-Retriever, arXiv 2407.15831), TopK-PercPos, for the margin that leaves out probable false negatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from afmrl_ray import storage
from afmrl_ray.catalogue.schema import write_catalogue
from afmrl_ray.retrieval.ranking import QUERY_TILE, own_columns, positive_columns
from afmrl_ray.retrieval.scores import best_columns, for_each_row


def mine_negatives(
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    query_rows: np.ndarray,
    gallery_rows: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    gallery_order: np.ndarray,
    count: int,
    margin: float,
) -> np.ndarray:
    """The most similar items of other products whose score is clearly below that of the query's positives.

    A negative's score is below `margin` times that of the least similar positive, so that it is a negative for every
    pair of the query; where that positive's score is negative, it is below by the same distance. The result does not
    depend on the order of the gallery.

    Args:
        queries: [Q, D] embeddings, of unit length.
        gallery: [N, D] embeddings, of unit length.
        query_rows: [Q] catalogue rows; the query's own item is neither positive nor negative.
        gallery_rows: [N] catalogue rows, each once.
        query_labels: [Q] codes of the queries' products, negative = unknown.
        gallery_labels: [N] codes of the items' products; an unknown one equals none.
        gallery_order: [N] integers, each once, ascending by item_id: of equal scores the smaller comes first.
        count: most negatives of a query.
        margin: fraction of the positive's score; NV-Retriever uses 0.95.

    Returns:
        [Q, count] catalogue rows, most similar first, -1 where there are fewer; a query without a positive in the
        gallery has none.
    """
    rows, labels = np.asarray(gallery_rows), np.asarray(gallery_labels)
    own = own_columns(query_rows, rows, np.argsort(rows))
    offsets, columns = positive_columns(np.asarray(query_labels), labels, np.argsort(labels, kind="stable"), own=own)
    found = np.full((len(own), count), -1)

    def mine(query: int, row: np.ndarray) -> None:
        positives = columns[offsets[query] : offsets[query + 1]]
        if not len(positives):
            return
        least = row[positives].min()
        row[row >= least - (1 - margin) * abs(least)] = -np.inf
        row[positives] = -np.inf
        best = best_columns(row, gallery_order, count)
        found[query, : len(best)] = rows[best]

    for_each_row(queries, np.asarray(gallery, dtype=np.float32), own, mine, query_tile=QUERY_TILE)
    return found


def write_negatives(path: str, items: Sequence[str], rows: np.ndarray, negatives: np.ndarray) -> None:
    """Write mined negatives as Parquet, a row per item with the ids of its negatives.

    Args:
        path: file, local or URI.
        items: ids of the catalogue's items by row.
        rows: [Q] catalogue rows.
        negatives: [Q, count] catalogue rows, -1 = none, see `mine_negatives`.
    """
    named = [[items[row] for row in found if row >= 0] for found in negatives.tolist()]
    ids = [items[row] for row in rows.tolist()]
    table = pa.table({"item_id": ids, "negatives": pa.array(named, pa.list_(pa.string()))})
    write_catalogue(table, path)


def read_negatives(path: str, items: Sequence[str]) -> list[list[str] | None]:
    """What `write_negatives` wrote, for every item of the catalogue; none for an item without."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
    found = dict(zip(table["item_id"].to_pylist(), table["negatives"].to_pylist(), strict=True))
    return [found.get(item) for item in items]
