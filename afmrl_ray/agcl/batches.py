"""Training pairs of each step: a pure function of seed and step, the same for any number of workers."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from afmrl_ray.agcl.grouping import AttributeGroups, ColumnGroups, ProductGroups, epoch_order
from afmrl_ray.attributes.store import AttributeStore
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
        store: attributes, which `agcl.batch_grouping.by: attributes` needs; none = there are none.
        negatives: ids of hard negatives by catalogue row, in place of column `negatives`.

    Raises:
        CatalogueError: a selector matches nothing, no product has a pair, a configured column does not exist, or no two
            products are similar enough for a group.
        ConfigError: there are fewer products than a batch needs, or groups need attributes and there are none.
    """

    def __init__(
        self,
        catalogue: StagedCatalogue,
        config: AGCLConfig,
        *,
        seed: int,
        store: AttributeStore | None = None,
        negatives: Sequence[Sequence[str] | None] | None = None,
    ) -> None:
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
        self._negatives = _hard_negatives(catalogue, self._code_of_row, negatives) if config.hard_negatives else {}
        self._groups = self._product_groups(catalogue, store) if config.batch_grouping.fraction else None
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

    def _product_groups(self, catalogue: StagedCatalogue, store: AttributeStore | None) -> ProductGroups:
        grouping = self._config.batch_grouping
        count = len(self._products)
        if grouping.by == "column":
            return ColumnGroups(catalogue, grouping.column, self._code_of_row, count)
        if store is None:
            raise ConfigError(
                "agcl.batch_grouping.by attributes needs attributes, and this training has none; train with an "
                "attribute table, or set agcl.batch_grouping.fraction=0"
            )
        items, texts = catalogue.column("item_id"), [""] * len(self._code_of_row)
        for row in catalogue.rows_of_any(self._config.selectors).tolist():
            texts[row] = store.text(items[row])
        return AttributeGroups(texts, self._code_of_row, count, grouping)

    def _make_epoch_order(self, epoch: int) -> np.ndarray:
        """Codes of all products, batch after batch; after the warm-up a fraction of each batch is of whole groups."""
        draw = np.random.default_rng([self._seed, epoch])
        count, size, grouping = len(self._products), self._config.batch_size, self._config.batch_grouping
        steps = range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        if self._groups is None or steps[-1] < grouping.warmup_steps:
            return draw.permutation(count)
        grouped = [round(grouping.fraction * size) if step >= grouping.warmup_steps else 0 for step in steps]
        return epoch_order(count, size, self._groups, draw, grouped=grouped)


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


def _hard_negatives(
    catalogue: StagedCatalogue, codes: Sequence[int], mined: Sequence[Sequence[str] | None] | None
) -> dict[int, list[int]]:
    """Hard negatives of each row as rows; unknown items and items of the row's own product are left out and counted."""
    row_of = {item: row for row, item in enumerate(catalogue.column("item_id"))}
    found: dict[int, list[int]] = {}
    unknown = same = 0
    for row, value in enumerate(catalogue.column("negatives") if mined is None else mined):
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
