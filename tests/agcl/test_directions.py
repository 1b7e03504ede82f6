"""Local rows and global columns of a batch, on any number of workers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from afmrl_ray.agcl.batches import Pair, PairSampler
from afmrl_ray.agcl.directions import local_items, positive_to_query, query_to_positive
from afmrl_ray.config.train import AGCLConfig

WORLD = 3


@pytest.fixture(scope="module")
def pairs(hard_negatives_catalogue_ref) -> list[Pair]:
    """Six pairs with two positives each and 11 hard negatives, which do not divide by three workers."""
    config = AGCLConfig(batch_size=6, hard_negatives=2, positives_per_query=2)
    sampler = PairSampler(hard_negatives_catalogue_ref.open(), config, seed=0)
    found = [pair for step in range(3) for pair in sampler.batch(step) if pair.negatives][:6]
    return [replace(found[0], negatives=found[0].negatives[:1]), *found[1:]]


def rows_and_columns(rows, columns) -> torch.Tensor:
    """Scores that encode the catalogue rows of both sides."""
    return torch.tensor(rows)[:, None] * 10_000 + torch.tensor(columns)


def test_columns_are_in_the_order_in_which_the_gather_concatenates_them(pairs):
    gathered: list[list[int]] = [[], []]
    for rank in range(WORLD):
        items, counts = local_items(pairs, rank=rank, world=WORLD)
        assert counts == [2, 4, 4]
        assert [item.row for item in items[:2]] == [pair.query.row for pair in pairs[2 * rank : 2 * rank + 2]]
        gathered[0] += [item.row for item in items[2:6]]
        gathered[1] += [item.row for item in items[6:]]
    for rank in range(WORLD):
        scores = query_to_positive(pairs, rank=rank, world=WORLD, lexical=rows_and_columns).lexical_scores
        assert (scores % 10_000).tolist() == [[*gathered[0], *gathered[1]]] * 2


def test_queries_know_their_positives_and_hard_negatives(pairs):
    for rank in range(WORLD):
        direction = query_to_positive(pairs, rank=rank, world=WORLD, lexical=rows_and_columns)
        assert direction.valid.tolist() == [True] * 23 + [False]
        for row, pair in enumerate(pairs[2 * rank : 2 * rank + 2]):
            scores = direction.lexical_scores[row]
            assert (scores // 10_000).unique().tolist() == [pair.query.row]
            columns = (scores % 10_000).tolist()
            for which, positive in enumerate(pair.positives):
                column = direction.positives[which][row]
                assert columns[column] == positive.row
                assert direction.products[column] == pair.query.product
            chosen = [columns[column] for column in direction.hard_negatives[row].nonzero()[:, 0].tolist()]
            assert chosen == [item.row for item in pair.negatives]


def test_positives_know_their_query(pairs):
    for rank in range(WORLD):
        direction = positive_to_query(pairs, rank=rank, world=WORLD, lexical=rows_and_columns)
        assert (direction.lexical_scores[0] % 10_000).tolist() == [pair.query.row for pair in pairs]
        assert direction.products == [pair.query.product for pair in pairs]
        assert direction.positives == [[2 * rank, 2 * rank, 2 * rank + 1, 2 * rank + 1]]
        assert direction.valid is direction.hard_negatives is None


def test_without_hard_negatives_and_scores_there_are_neither(pairs):
    plain = [replace(pair, negatives=()) for pair in pairs]
    direction = query_to_positive(plain)
    assert direction.lexical_scores is direction.hard_negatives is direction.valid is None
    assert len(direction.products) == 12
    assert local_items(plain)[1] == [6, 12, 0]
