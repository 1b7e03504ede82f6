"""Groups of similar products that share a batch, and an epoch's order of the products that is made of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from afmrl_ray.agcl.mining import AttributeNeighbours
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.train import BatchGroupingConfig
from afmrl_ray.errors import CatalogueError


class ProductGroups(Protocol):
    """A source of groups of similar products."""

    def groups(self, draw: np.random.Generator, free: np.ndarray) -> Iterator[Sequence[int]]:
        """The groups of an epoch, in random order, made while they are taken.

        Args:
            draw: random numbers.
            free: [P] bool, products that are in no batch yet; the caller clears entries as it places products.
        """


class ColumnGroups:
    """Groups of at least two products with an equal value of a column.

    Args:
        catalogue: where the column is.
        column: its name; a product has the value of its first item that has one.
        codes: of each row's product; others than 0 to `count` - 1 are in no group.
        count: number of products P.

    Raises:
        CatalogueError: there is no such column, or no two products share a value.
    """

    def __init__(self, catalogue: StagedCatalogue, column: str, codes: Sequence[int], count: int) -> None:
        values = catalogue.column(column)
        group_of: dict[int, str] = {}
        for row, code in enumerate(codes):
            if 0 <= code < count and values[row] is not None:
                group_of.setdefault(code, str(values[row]))
        groups: dict[str, list[int]] = {}
        for code in sorted(group_of):
            groups.setdefault(group_of[code], []).append(code)
        self._groups = [members for _, members in sorted(groups.items()) if len(members) > 1]
        if not self._groups:
            raise CatalogueError(
                f"agcl.batch_grouping.column {column!r}: no two products share a value; "
                "set agcl.batch_grouping.fraction=0"
            )

    def groups(self, draw: np.random.Generator, free: np.ndarray) -> Iterator[Sequence[int]]:
        """See `ProductGroups.groups`; placed products are among the members."""
        shuffled = [draw.permutation(group).tolist() for group in self._groups]
        for place in draw.permutation(len(shuffled)).tolist():
            yield shuffled[place]


class AttributeGroups:
    """Groups of products with similar attributes.

    Args:
        texts: attribute text of each catalogue row; empty = the row does not describe its product.
        codes: of each row's product; others than 0 to `count` - 1 are in no group.
        count: number of products P.
        config: `agcl.batch_grouping`.

    Raises:
        CatalogueError: no two products share an attribute.
    """

    def __init__(self, texts: Sequence[str], codes: Sequence[int], count: int, config: BatchGroupingConfig) -> None:
        self._size = config.group_size
        known = [code if code < count else -1 for code in codes]
        self._neighbours = AttributeNeighbours.from_texts(
            texts, known, count=count, max_similarity=config.max_similarity
        )
        if not self._neighbours.any_shared:
            raise CatalogueError(
                "agcl.batch_grouping.by attributes: no two products share an attribute pair; "
                "set agcl.batch_grouping.fraction=0"
            )

    def groups(self, draw: np.random.Generator, free: np.ndarray) -> Iterator[Sequence[int]]:
        """See `ProductGroups.groups`; a group's members are not placed when it is taken."""
        for group in self._neighbours.groups(self._size, draw, free):
            yield group.tolist()


def epoch_order(
    count: int, batch_size: int, groups: ProductGroups, draw: np.random.Generator, *, grouped: Sequence[int]
) -> np.ndarray:
    """Products batch after batch, each product at most once.

    A batch begins with whole groups; one that does not fit is continued in the next batch. All other products come in
    random order, also where groups have run out.

    Args:
        count: number of products P.
        batch_size: products in a batch.
        groups: of products.
        draw: random numbers.
        grouped: for each batch, how many of its products come from groups.

    Returns:
        [len(grouped) * batch_size] codes.
    """
    rest = deque(draw.permutation(count).tolist())
    free = np.ones(count, dtype=bool)
    found, waiting = groups.groups(draw, free), deque[int]()
    made: list[int] = []

    def place(code: int) -> None:
        if free[code]:
            free[code] = False
            made.append(code)

    for number, from_groups in enumerate(grouped):
        start = number * batch_size
        while len(made) < start + from_groups:
            if not waiting:
                waiting.extend(next(found, ()))
                if not waiting:
                    break
            place(waiting.popleft())
        while len(made) < start + batch_size:
            place(rest.popleft())
    return np.array(made)
