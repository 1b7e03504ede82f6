"""Where each item of a step stands: which rows and columns a worker's share of the loss has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afmrl_ray.agcl.batches import Pair, SampledItem


@dataclass(frozen=True)
class Direction:
    """Local rows that look for their positives among everybody's candidates.

    Attributes:
        positives: for each positive of a row: [rows] its column.
        own_texts: [rows] attributes of the local rows.
        candidate_texts: [columns] attributes of the candidates.
        products: [columns] codes of the candidates' products.
        exempt: [rows, columns] bool, curated negatives of the row; none = no row has any.
        valid: [columns] bool, False for columns that only fill up a worker's share; none = all count.
    """

    positives: list[list[int]]
    own_texts: list[str]
    candidate_texts: list[str]
    products: list[int]
    exempt: Tensor | None = None
    valid: Tensor | None = None


class Batch:
    """The items of a step: everybody's, and those that this worker embeds.

    Columns are all positives, those of a pair side by side, then all curated negatives.

    Args:
        pairs: of the whole step.
        rank: of this worker.
        world: number of workers.
        product_of: code of a catalogue row's product.
    """

    def __init__(self, pairs: list[Pair], rank: int, world: int, product_of: Callable[[int], int]) -> None:
        share = len(pairs) // world
        self.pairs, self._first, self._product_of = pairs, rank * share, product_of
        self._local = pairs[self._first : self._first + share]
        negatives = [(place, shown) for place, pair in enumerate(pairs) for shown in pair.negatives]
        # Every worker embeds as many; what fills up the last share belongs to no pair.
        filling = -len(negatives) % world
        self.negatives: list[tuple[int, SampledItem]] = [*negatives, *[(-1, pairs[0].query)] * filling]
        each = len(self.negatives) // world
        self._local_negatives = self.negatives[rank * each : (rank + 1) * each]
        self._per_query = len(pairs[0].positives)

    @property
    def counts(self) -> list[int]:
        """Queries, positives and negatives that this worker embeds, in this order."""
        return [len(self._local), len(self._local) * self._per_query, len(self._local_negatives)]

    def local_items(self) -> list[tuple[SampledItem, int, bool]]:
        """What this worker embeds: the item, the entry of `agcl.pairs`, and whether it is shown as a query."""
        return [
            *((pair.query, pair.source, True) for pair in self._local),
            *((shown, pair.source, False) for pair in self._local for shown in pair.positives),
            *((shown, self.pairs[place].source, False) for place, shown in self._local_negatives),
        ]

    def query_to_positive(self, text: Callable[[int], str]) -> Direction:
        """Queries look for their positives."""
        columns = [shown for pair in self.pairs for shown in pair.positives]
        columns += [shown for _, shown in self.negatives]
        places = range(self._first, self._first + len(self._local))
        direction = Direction(
            positives=[[place * self._per_query + which for place in places] for which in range(self._per_query)],
            own_texts=[text(pair.query.row) for pair in self._local],
            candidate_texts=[text(shown.row) for shown in columns],
            products=[self._product_of(shown.row) for shown in columns],
        )
        if not self.negatives:
            return direction
        owner = torch.full((len(columns),), -2)
        owner[len(columns) - len(self.negatives) :] = torch.tensor([place for place, _ in self.negatives])
        return replace(direction, exempt=owner[None] == torch.tensor(places)[:, None], valid=owner != -1)

    def positive_to_query(self, text: Callable[[int], str]) -> Direction:
        """Positives look for their query."""
        places = [self._first + place for place in range(len(self._local)) for _ in range(self._per_query)]
        return Direction(
            positives=[places],
            own_texts=[text(shown.row) for pair in self._local for shown in pair.positives],
            candidate_texts=[text(pair.query.row) for pair in self.pairs],
            products=[pair.product for pair in self.pairs],
        )
