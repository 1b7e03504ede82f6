"""Which pairs are in which batch: a pure function of seed and step, the same for any number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.train import PairConfig
from afmrl_ray.errors import CatalogueError, ConfigError


@dataclass(frozen=True)
class Pair:
    """Two listings of one product.

    Attributes:
        query: catalogue row of the query.
        positive: catalogue row of the positive.
        source: index of the `agcl.pairs` entry that the pair comes from.
        product: code of the product; equal codes are the same product.
        enrich_query: number in [0, 1) that decides whether the query shows its attributes.
        enrich_positive: the same for the positive.
    """

    query: int
    positive: int
    source: int
    product: int
    enrich_query: float
    enrich_positive: float


class PairSampler:
    """Uniform over products: every epoch visits each product once, one listing pair of it at a time.

    Args:
        catalogue: where rows and product ids come from.
        sources: `agcl.pairs`.
        batch_size: pairs per step over all workers.
        seed: of the order and the draws.

    Raises:
        CatalogueError: a side is empty, or no product has a pair.
        ConfigError: fewer products than a batch needs.
    """

    def __init__(
        self, catalogue: StagedCatalogue, sources: Sequence[PairConfig], *, batch_size: int, seed: int
    ) -> None:
        products = catalogue.column("product_id")
        self._weights = np.array([source.weight for source in sources])
        self._sides: list[tuple[dict[str, list[int]], dict[str, list[int]]]] = []
        paired: set[str] = set()
        for source in sources:
            queries = _by_product(catalogue.rows(source.query), products)
            positives = _by_product(catalogue.rows(source.positive), products)
            self._sides.append((queries, positives))
            paired |= {p for p in queries.keys() & positives.keys() if len({*queries[p], *positives[p]}) > 1}
        if not paired:
            raise CatalogueError(
                "agcl.pairs: no product has two different listings on the two sides, nothing is positive"
            )
        if len(paired) < batch_size:
            raise ConfigError(
                f"agcl.batch_size {batch_size} exceeds the {len(paired)} products that have pairs; "
                "lower it, since a batch holds each product once"
            )
        self._products = sorted(paired)
        self._batch_size = batch_size
        self._seed = seed

    @property
    def steps_per_epoch(self) -> int:
        return len(self._products) // self._batch_size

    def batch(self, step: int) -> list[Pair]:
        """The `batch_size` pairs of a step, each of another product."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._products))
        chosen = order[place * self._batch_size : (place + 1) * self._batch_size]
        draw = np.random.default_rng([self._seed, epoch, place, 1])
        return [self._pair(int(code), draw) for code in chosen]

    def _pair(self, code: int, draw: np.random.Generator) -> Pair:
        product = self._products[code]
        able = [
            i
            for i, (q, p) in enumerate(self._sides)
            if len({*q.get(product, ()), *p.get(product, ())}) > 1 and product in q and product in p
        ]
        weights = self._weights[able]
        source = able[int(draw.choice(len(able), p=weights / weights.sum()))]
        queries, positives = self._sides[source]
        query = int(draw.choice([q for q in queries[product] if set(positives[product]) != {q}]))
        positive = int(draw.choice([p for p in positives[product] if p != query]))
        return Pair(query, positive, source, code, float(draw.random()), float(draw.random()))


def _by_product(rows: np.ndarray, products: Sequence[str | None]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row in rows.tolist():
        product = products[row]
        if product is not None:
            groups.setdefault(product, []).append(row)
    return groups
