"""Local rows and global columns of the loss, in the two retrieval directions.

Every worker embeds an equal part of a step's pairs and knows the whole batch, so that it can compute BM25 scores and
masks of its rows against the gathered columns of all workers. Columns are all positives, those of a pair adjacent, then
all hard negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afmrl_ray.agcl.batches import Pair, SampledItem

LexicalScores = Callable[[Sequence[int], Sequence[int]], Tensor]
"""BM25 of the attributes of R catalogue rows against those of C others: [R, C]."""


@dataclass(frozen=True)
class TrueCodes:
    """What is known of every catalogue row, for statistics and for the mask of kind `column`.

    Attributes:
        families: codes of their families, -1 = unknown; none = the catalogue has no families.
        true_products: codes of their true products, -1 = unknown; none = the catalogue does not have them.
    """

    families: Sequence[int] | None = None
    true_products: Sequence[int] | None = None


@dataclass(frozen=True)
class RetrievalDirection:
    """R local rows that retrieve their positives among the C candidates of all workers.

    Attributes:
        positives: for each positive of a row: [R] its column.
        products: [C] codes of the candidates' products.
        lexical_scores: [R, C] float32, BM25 of a row's attributes against the candidates'; none = not used.
        hard_negatives: [R, C] bool, hard negatives of the row; none = no row has any.
        valid: [C] bool, False for padding, which is no candidate; none = all are valid.
        families: [C] codes of the candidates' families, -1 = unknown; none = not known of any.
        true_products: [C] codes of the candidates' true products, -1 = unknown; none = not known of any.
    """

    positives: list[list[int]]
    products: list[int]
    lexical_scores: Tensor | None = None
    hard_negatives: Tensor | None = None
    valid: Tensor | None = None
    families: list[int] | None = None
    true_products: list[int] | None = None


def local_items(pairs: Sequence[Pair], *, rank: int = 0, world: int = 1) -> tuple[list[SampledItem], list[int]]:
    """The items that a worker embeds, and how many of them are queries, positives and hard negatives, in this order."""
    local = [pairs[index] for index in _local(pairs, rank, world)]
    negatives = _negatives(pairs, world)
    each = len(negatives) // world
    kinds = (
        [pair.query for pair in local],
        [item for pair in local for item in pair.positives],
        [item for _, item in negatives[rank * each : (rank + 1) * each]],
    )
    return [item for items in kinds for item in items], [len(items) for items in kinds]


def query_to_positive(
    pairs: Sequence[Pair],
    *,
    rank: int = 0,
    world: int = 1,
    lexical: LexicalScores | None = None,
    true_codes: TrueCodes | None = None,
) -> RetrievalDirection:
    """Local queries retrieve their positives among the positives and hard negatives of all workers."""
    local, per_query, negatives = _local(pairs, rank, world), len(pairs[0].positives), _negatives(pairs, world)
    columns = [item for pair in pairs for item in pair.positives] + [item for _, item in negatives]
    chosen = valid = None
    if negatives:
        owner = torch.full((len(columns),), -2)
        owner[len(columns) - len(negatives) :] = torch.tensor([index for index, _ in negatives])
        chosen, valid = owner[None] == torch.tensor(local)[:, None], owner != -1
    return RetrievalDirection(
        positives=[[index * per_query + which for index in local] for which in range(per_query)],
        products=[item.product for item in columns],
        lexical_scores=_scores(lexical, [pairs[index].query for index in local], columns),
        hard_negatives=chosen,
        valid=valid,
        families=_codes(true_codes.families, columns) if true_codes else None,
        true_products=_codes(true_codes.true_products, columns) if true_codes else None,
    )


def positive_to_query(
    pairs: Sequence[Pair],
    *,
    rank: int = 0,
    world: int = 1,
    lexical: LexicalScores | None = None,
    true_codes: TrueCodes | None = None,
) -> RetrievalDirection:
    """Local positives retrieve their query among the queries of all workers."""
    local, per_query = _local(pairs, rank, world), len(pairs[0].positives)
    columns = [pair.query for pair in pairs]
    return RetrievalDirection(
        positives=[[index for index in local for _ in range(per_query)]],
        products=[item.product for item in columns],
        lexical_scores=_scores(lexical, [item for index in local for item in pairs[index].positives], columns),
        true_products=_codes(true_codes.true_products, columns) if true_codes else None,
    )


def _local(pairs: Sequence[Pair], rank: int, world: int) -> range:
    """Indices of the pairs that a worker embeds."""
    each = len(pairs) // world
    return range(rank * each, (rank + 1) * each)


def _negatives(pairs: Sequence[Pair], world: int) -> list[tuple[int, SampledItem]]:
    """All hard negatives with the index of their pair, padded to a multiple of `world` by items of no pair (-1)."""
    negatives = [(index, item) for index, pair in enumerate(pairs) for item in pair.negatives]
    return [*negatives, *[(-1, pairs[0].query)] * (-len(negatives) % world)]


def _scores(
    lexical: LexicalScores | None, rows: Sequence[SampledItem], columns: Sequence[SampledItem]
) -> Tensor | None:
    return lexical([item.row for item in rows], [item.row for item in columns]) if lexical is not None else None


def _codes(of_rows: Sequence[int] | None, columns: Sequence[SampledItem]) -> list[int] | None:
    return [of_rows[item.row] for item in columns] if of_rows is not None else None
