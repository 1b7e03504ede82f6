"""Which items are in which batch: a pure function of seed and step, the same for any number of workers."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.train import AGCLConfig
from afmrl_ray.errors import CatalogueError, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledItem:
    """An item in a batch.

    Attributes:
        row: catalogue row.
        attribute_draw: number in [0, 1); the attributes are shown where it is below 1 - `agcl.attribute_dropout`.
    """

    row: int
    attribute_draw: float


@dataclass(frozen=True)
class Pair:
    """A query with its positives, different items of one product.

    Attributes:
        query: the query.
        positives: `agcl.positives_per_query` items, drawn with replacement where the product has fewer.
        negatives: curated ones, at most `agcl.hard_negatives`.
        source: index of the `agcl.pairs` entry that the pair comes from.
        product: code of the product; equal codes are the same product.
    """

    query: SampledItem
    positives: tuple[SampledItem, ...]
    negatives: tuple[SampledItem, ...]
    source: int
    product: int


class PairSampler:
    """Uniform over products: every epoch visits each product once, another item of it each time.

    Args:
        catalogue: where rows and product ids come from.
        config: `agcl`.
        seed: of the order and the draws.

    Raises:
        CatalogueError: a side is empty, no product has a pair, or a column that the config names is not there.
        ConfigError: fewer products than a batch needs.
    """

    def __init__(self, catalogue: StagedCatalogue, config: AGCLConfig, *, seed: int) -> None:
        products = catalogue.column("product_id")
        self._config, self._seed = config, seed
        self._weights = np.array([source.weight for source in config.pairs])
        self._sides: list[tuple[dict[str, list[int]], dict[str, list[int]]]] = []
        paired: set[str] = set()
        for source in config.pairs:
            queries = _by_product(catalogue.rows(source.query), products)
            positives = _by_product(catalogue.rows(source.positive), products)
            self._sides.append((queries, positives))
            paired |= {p for p in queries.keys() & positives.keys() if len({*queries[p], *positives[p]}) > 1}
        if not paired:
            raise CatalogueError("agcl.pairs: no product has two different items on the two sides, nothing is positive")
        # Products with pairs come first, so that their codes are places in the epoch's order.
        self._products = _share_of(sorted(paired), config.train_fraction, seed)
        if len(self._products) < config.batch_size:
            cut = f" after agcl.train_fraction {config.train_fraction:g}" if config.train_fraction < 1 else ""
            raise ConfigError(
                f"agcl.batch_size {config.batch_size} exceeds the {len(self._products)} products that have pairs{cut}; "
                "lower it, since a batch holds each product once"
            )
        others = sorted({product for product in products if product is not None} - set(self._products))
        codes = {product: code for code, product in enumerate([*self._products, *others])}
        self._code_of_row = [codes[product] if product is not None else -1 for product in products]
        self._curated = _curated(catalogue, self._code_of_row) if config.hard_negatives else {}
        self._groups = self._hard_groups(catalogue) if config.batch_grouping.fraction else []
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._products) // self._config.batch_size

    def product_of(self, row: int) -> int:
        """Code of a row's product; -1 if it has none."""
        return self._code_of_row[row]

    def batch(self, step: int) -> list[Pair]:
        """The `batch_size` pairs of a step, each of another product."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self._config.batch_size
        chosen = self._epoch_order(epoch)[place * size : (place + 1) * size]
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
        others = [p for p in positives[product] if p != query]
        count = self._config.positives_per_query
        picked = draw.choice(others, size=count, replace=len(others) < count).tolist()
        curated = self._curated.get(query, [])
        wanted = min(self._config.hard_negatives, len(curated))
        negatives = draw.choice(curated, size=wanted, replace=False).tolist() if wanted else []
        shown = [SampledItem(int(row), float(draw.random())) for row in (query, *picked, *negatives)]
        return Pair(shown[0], tuple(shown[1 : 1 + count]), tuple(shown[1 + count :]), source, code)

    def _hard_groups(self, catalogue: StagedCatalogue) -> list[list[int]]:
        """Codes of the products that share a value of `batch_grouping.column`, groups of at least two."""
        values = catalogue.column(self._config.batch_grouping.column)
        group_of: dict[int, str] = {}
        for row, code in enumerate(self._code_of_row):
            if 0 <= code < len(self._products) and values[row] is not None:
                group_of.setdefault(code, str(values[row]))
        groups: dict[str, list[int]] = {}
        for code in sorted(group_of):
            groups.setdefault(group_of[code], []).append(code)
        found = [codes for _, codes in sorted(groups.items()) if len(codes) > 1]
        if not found:
            raise CatalogueError(
                f"agcl.batch_grouping.column {self._config.batch_grouping.column!r}: no two products share a value; "
                "set agcl.batch_grouping.fraction=0"
            )
        return found

    def _make_epoch_order(self, epoch: int) -> np.ndarray:
        """Codes of all products, batch after batch; `batch_grouping.fraction` of each batch is made of whole groups."""
        draw = np.random.default_rng([self._seed, epoch])
        order = draw.permutation(len(self._products))
        if not self._groups:
            return order
        queues = [deque(draw.permutation(group).tolist()) for group in self._groups]
        waiting = deque(draw.permutation(len(queues)).tolist())
        rest, taken, made = deque(order.tolist()), np.zeros(len(order), dtype=bool), []
        size = self._config.batch_size
        hard = round(self._config.batch_grouping.fraction * size)
        for _ in range(self.steps_per_epoch):
            batch: list[int] = []
            while len(batch) < hard and waiting:
                queue = queues[waiting[0]]
                while queue and len(batch) < hard:
                    code = queue.popleft()
                    if not taken[code]:
                        taken[code] = True
                        batch.append(code)
                if not queue:
                    waiting.popleft()
            while len(batch) < size:
                code = rest.popleft()
                if not taken[code]:
                    taken[code] = True
                    batch.append(code)
            made.extend(batch)
        return np.array(made)


def _share_of(products: list[str], share: float, seed: int) -> list[str]:
    """That share of the products, drawn by the seed; a smaller share of the same seed is a part of a larger one."""
    if share == 1:
        return products
    order = np.random.default_rng([seed, 17]).permutation(len(products))
    return sorted(products[place] for place in order[: max(1, round(share * len(products)))])


def _by_product(rows: np.ndarray, products: Sequence[str | None]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row in rows.tolist():
        product = products[row]
        if product is not None:
            groups.setdefault(product, []).append(row)
    return groups


def _curated(catalogue: StagedCatalogue, codes: Sequence[int]) -> dict[int, list[int]]:
    """Rows of each row's curated negatives; those of its own product, and unknown items, are left out and counted."""
    row_of = {item: row for row, item in enumerate(catalogue.column("item_id"))}
    found: dict[int, list[int]] = {}
    unknown = same = 0
    for row, value in enumerate(catalogue.column("negatives")):
        items = json.loads(value) if isinstance(value, str) else value or []
        known = [row_of[item] for item in items if item in row_of]
        others = [other for other in known if codes[other] < 0 or codes[other] != codes[row]]
        unknown, same = unknown + len(items) - len(known), same + len(known) - len(others)
        if others:
            found[row] = others
    if unknown or same:
        log.warning(
            "column negatives: left out %d items that are not in the catalogue and %d of the row's own product",
            unknown,
            same,
        )
    if not found:
        raise CatalogueError("column negatives holds no usable item id; set agcl.hard_negatives=0")
    return found
