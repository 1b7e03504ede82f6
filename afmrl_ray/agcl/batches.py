"""Training pairs of each step: a pure function of seed and step, the same for any number of workers."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.train import AGCLConfig
from afmrl_ray.errors import CatalogueError, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampledItem:
    """An item of a batch.

    Attributes:
        row: catalogue row.
        product: code of its product, equal for items of one product; -1 = unknown.
        selector: which inputs and title columns of the item are used.
        with_attributes: whether its attributes are part of the input.
    """

    row: int
    product: int
    selector: ItemSelector
    with_attributes: bool


@dataclass(frozen=True)
class Pair:
    """A query with its positives and hard negatives.

    Attributes:
        query: the query.
        positives: `agcl.positives_per_query` other items of its product, repeated if the product has fewer.
        negatives: at most `agcl.hard_negatives` items of other products that the catalogue names for the query.
    """

    query: SampledItem
    positives: tuple[SampledItem, ...]
    negatives: tuple[SampledItem, ...]


class PairSampler:
    """Samples pairs uniformly over products: every epoch visits each product once, with other items of it each time.

    Args:
        catalogue: where rows and product ids come from.
        config: `agcl`.
        seed: of order and draws.

    Raises:
        CatalogueError: a selector matches nothing, no product has a pair, or a configured column does not exist.
        ConfigError: there are fewer products than a batch needs.
    """

    def __init__(self, catalogue: StagedCatalogue, config: AGCLConfig, *, seed: int) -> None:
        products = catalogue.column("product_id")
        self._config, self._seed = config, seed
        self._weights = np.array([source.weight for source in config.pairs])
        self._sources: list[tuple[dict[str, list[int]], dict[str, list[int]]]] = []
        paired: set[str] = set()
        for source in config.pairs:
            queries = _by_product(catalogue.rows(source.query), products)
            positives = _by_product(catalogue.rows(source.positive), products)
            self._sources.append((queries, positives))
            paired |= {p for p in queries.keys() & positives.keys() if len({*queries[p], *positives[p]}) > 1}
        if not paired:
            raise CatalogueError(
                "agcl.pairs: no product has two different items, a query and a positive, so nothing is positive"
            )
        # Products with pairs come first, so that their codes are their places in an epoch's permutation.
        self._products = _subset(sorted(paired), config.train_fraction, seed)
        if len(self._products) < config.batch_size:
            cut = f" after agcl.train_fraction {config.train_fraction:g}" if config.train_fraction < 1 else ""
            raise ConfigError(
                f"agcl.batch_size {config.batch_size} exceeds the {len(self._products)} products that have pairs{cut}; "
                "lower it, since a batch holds each product once"
            )
        others = sorted({product for product in products if product is not None} - set(self._products))
        codes = {product: code for code, product in enumerate([*self._products, *others])}
        self._code_of_row = [codes[product] if product is not None else -1 for product in products]
        self._negatives = _hard_negatives(catalogue, self._code_of_row) if config.hard_negatives else {}
        self._groups = self._product_groups(catalogue) if config.batch_grouping.fraction else []
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return len(self._products) // self._config.batch_size

    def batch(self, step: int) -> list[Pair]:
        """The `batch_size` pairs of a step over all workers, each of another product."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self._config.batch_size
        chosen = self._epoch_order(epoch)[place * size : (place + 1) * size]
        draw = np.random.default_rng([self._seed, epoch, place, 1])
        return [self._pair(int(code), draw) for code in chosen]

    def _pair(self, code: int, draw: np.random.Generator) -> Pair:
        product = self._products[code]
        usable = [
            i
            for i, (q, p) in enumerate(self._sources)
            if len({*q.get(product, ()), *p.get(product, ())}) > 1 and product in q and product in p
        ]
        weights = self._weights[usable]
        source = usable[int(draw.choice(len(usable), p=weights / weights.sum()))]
        queries, positives = self._sources[source]
        query = int(draw.choice([q for q in queries[product] if set(positives[product]) != {q}]))
        others = [p for p in positives[product] if p != query]
        count = self._config.positives_per_query
        picked = draw.choice(others, size=count, replace=len(others) < count).tolist()
        named = self._negatives.get(query, [])
        wanted = min(self._config.hard_negatives, len(named))
        negatives = draw.choice(named, size=wanted, replace=False).tolist() if wanted else []
        selectors, dropout = self._config.pairs[source], self._config.attribute_dropout

        def sampled(row: int, selector: ItemSelector, dropout: float) -> SampledItem:
            return SampledItem(row, self._code_of_row[row], selector, float(draw.random()) < 1 - dropout)

        shown = [sampled(query, selectors.query, dropout.query)]
        shown += [sampled(row, selectors.positive, dropout.positive) for row in (*picked, *negatives)]
        return Pair(shown[0], tuple(shown[1 : 1 + count]), tuple(shown[1 + count :]))

    def _product_groups(self, catalogue: StagedCatalogue) -> list[list[int]]:
        """Groups of at least two products with an equal value of `batch_grouping.column`, as their codes."""
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
        grouped = round(self._config.batch_grouping.fraction * size)
        for _ in range(self.steps_per_epoch):
            batch: list[int] = []
            while len(batch) < grouped and waiting:
                queue = queues[waiting[0]]
                while queue and len(batch) < grouped:
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


def _subset(products: list[str], fraction: float, seed: int) -> list[str]:
    """A random fraction of the products; with one seed, a smaller fraction is a subset of a larger one."""
    if fraction == 1:
        return products
    order = np.random.default_rng([seed, 17]).permutation(len(products))
    return sorted(products[place] for place in order[: max(1, round(fraction * len(products)))])


def _by_product(rows: np.ndarray, products: Sequence[str | None]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row in rows.tolist():
        product = products[row]
        if product is not None:
            groups.setdefault(product, []).append(row)
    return groups


def _hard_negatives(catalogue: StagedCatalogue, codes: Sequence[int]) -> dict[int, list[int]]:
    """Hard negatives of each row as rows; unknown items and items of the row's own product are left out and counted."""
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
