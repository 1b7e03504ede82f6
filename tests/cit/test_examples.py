"""What an evaluation keeps to be looked at, against plain loops over all scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from afmrl_ray.cit.examples import HITS_SHOWN, WORST, examples, failures
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.retrieval.evaluate import rank

PROTOCOL = RetrievalProtocol(kind="retrieval", name="fine")


@pytest.fixture(scope="module")
def searched(tiny_catalogue_ref):
    """The catalogue, a random embedding of every row, and how sides are embedded."""
    catalogue = tiny_catalogue_ref.open()
    vectors = np.random.default_rng(3).normal(size=(len(catalogue), 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed(side: ItemSelector, with_attributes: bool) -> tuple[np.ndarray, np.ndarray]:
        rows = catalogue.rows(side)
        # Items with attributes are embedded elsewhere, so that a mixed-up selection is detected.
        return rows, vectors[rows] if with_attributes else vectors[rows][:, ::-1]

    queries, gallery = embed(PROTOCOL.query, True), embed(PROTOCOL.gallery, True)
    return catalogue, vectors, embed, rank(catalogue, PROTOCOL.label, *queries, *gallery, depth=20)


def by_hand(catalogue, vectors, query: int) -> tuple[int, int, list[int]]:
    """Place of the best positive, its row, and all rows by score, of one query."""
    gallery = [row for row in catalogue.rows(PROTOCOL.gallery).tolist() if row != query]
    labels = catalogue.column(PROTOCOL.label)
    ordered = sorted(gallery, key=lambda row: -float(vectors[row] @ vectors[query]))
    place = next(place for place, row in enumerate(ordered) if labels[row] == labels[query])
    return place + 1, ordered[place], ordered


def test_failures_are_the_worst_queries_with_their_best_positive(searched):
    catalogue, vectors, embed, ranking = searched
    found = failures(ranking, catalogue, lambda item: f"of: {item}", PROTOCOL, embed)
    places = {query: by_hand(catalogue, vectors, query) for query in ranking.query_rows.tolist()}
    assert len(found) == min(WORST, len(places))
    assert [each["rank"] for each in found] == sorted((place for place, _, _ in places.values()), reverse=True)[:WORST]
    for each in found:
        place, positive, _ = places[each["query_row"]]
        assert each["rank"] == place
        assert each["missed"] == {
            "row": positive,
            "item_id": catalogue.item(positive).item_id,
            "attributes": f"of: {catalogue.item(positive).item_id}",
        }


def test_a_query_that_is_answered_rightly_is_no_failure(searched):
    catalogue, _, embed, ranking = searched
    first = ranking.ranks[ranking.offsets[:-1]]
    # All but the three worst are answered rightly.
    best = np.where(first >= np.sort(first)[-3], first, 0)
    ranks = ranking.ranks.copy()
    ranks[ranking.offsets[:-1]] = best
    found = failures(replace(ranking, ranks=ranks), catalogue, lambda item: "", PROTOCOL, embed)
    assert [each["rank"] for each in found] == sorted(first + 1, reverse=True)[: np.count_nonzero(best)]
    assert 3 <= len(found) < WORST
    ranks[ranking.offsets[:-1]] = 0
    assert failures(replace(ranking, ranks=ranks), catalogue, lambda item: "", PROTOCOL, embed) == []


def test_examples_are_drawn_by_seed_with_their_first_hits(searched, monkeypatch):
    monkeypatch.setattr("afmrl_ray.cit.examples.DRAWN", 4)
    catalogue, vectors, _, ranking = searched
    drawn = examples(ranking, catalogue, lambda item: "", seed=1)
    assert drawn == examples(ranking, catalogue, lambda item: "", seed=1)
    assert drawn != examples(ranking, catalogue, lambda item: "", seed=2)
    assert len(drawn) == 4
    labels = catalogue.column(PROTOCOL.label)
    for each in drawn:
        ordered = by_hand(catalogue, vectors, each["query_row"])[2][:HITS_SHOWN]
        assert [hit["row"] for hit in each["hits"]] == ordered
        assert [hit["right"] for hit in each["hits"]] == [labels[row] == labels[each["query_row"]] for row in ordered]
