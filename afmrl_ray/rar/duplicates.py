"""Gallery items that are probably offers of a query's own product under another product id."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from afmrl_ray.attributes.text import Attributes


def known_duplicates(
    query_rows: Iterable[int],
    gallery_rows: np.ndarray,
    embeddings: np.ndarray,
    *,
    labels: Sequence[int],
    attributes: Mapping[int, Attributes],
    threshold: float,
) -> dict[int, np.ndarray]:
    """Items of other products with the query's attributes and an embedding close to one of the query's positives.

    Args:
        query_rows: catalogue rows of the queries.
        gallery_rows: [N] catalogue rows.
        embeddings: [N, D] of unit length.
        labels: product of each catalogue row, negative for unknown.
        attributes: in normal form, by catalogue row, of queries and gallery; their order does not matter, and items
            without attributes have no duplicates.
        threshold: cosine to a positive above which an item counts.

    Returns:
        Ascending catalogue rows of the duplicates by query row, of the queries that have any.
    """
    by_attributes: dict[frozenset[tuple[str, str]], list[int]] = defaultdict(list)
    by_label: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(gallery_rows.tolist()):
        by_attributes[frozenset(attributes[row])].append(place)
        by_label[labels[row]].append(place)
    found = {}
    for query in query_rows:
        own, pairs = labels[query], frozenset(attributes[query])
        positives = [place for place in by_label.get(own, ()) if gallery_rows[place] != query]
        if own < 0 or not pairs or not positives:
            continue
        others = [
            place
            for place in by_attributes.get(pairs, ())
            if labels[gallery_rows[place]] != own and gallery_rows[place] != query
        ]
        if not others:
            continue
        nearest = (embeddings[others] @ embeddings[positives].T).max(1)
        rows = np.sort(gallery_rows[others][nearest > threshold])
        if len(rows):
            found[int(query)] = rows
    return found
