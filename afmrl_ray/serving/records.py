"""The records that the item store keeps and hands out: plain data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from afmrl_ray.serving.bundle import Bundle


@dataclass(frozen=True)
class StoredItem:
    """An item as it was upserted.

    Attributes:
        item_id: unique.
        title: the seller's text.
        category: coarse label.
        product_id: identity of the product.
        given: attribute text that came with the item; None = each round's generator writes it.
        image: encoded.
        thumbnail: small JPEG.
    """

    item_id: str
    title: str
    category: str | None
    product_id: str | None
    given: str | None
    image: bytes | None
    thumbnail: bytes | None


@dataclass(frozen=True)
class EmbeddedItem:
    """What a bundle's models make of an item: attribute text, and vector [D] float32."""

    attributes: str
    vector: np.ndarray


@dataclass(frozen=True)
class DeltaItem:
    """An upserted item as searches under one bundle see it; `vector` is [D] float32."""

    item_id: str
    title: str
    category: str | None
    product_id: str | None
    attributes: str
    vector: np.ndarray


@dataclass(frozen=True)
class Change:
    """An upsert or a deletion.

    Attributes:
        seq: sequence number.
        item_id: of the item.
        item: under the bundle of the query, as it is now; None = it was deleted.
    """

    seq: int
    item_id: str
    item: DeltaItem | None


@dataclass(frozen=True)
class State:
    """What is served.

    Attributes:
        current: the bundle that answers searches.
        switching_to: the bundle that is being prepared to replace it; None = no switch is under way.
        history: bundles that were served before, the latest last.
    """

    current: Bundle
    switching_to: Bundle | None
    history: tuple[Bundle, ...]

    @property
    def needed(self) -> dict[str, Bundle]:
        """Bundles under which a new item must be embedded, by key."""
        return {bundle.key: bundle for bundle in (self.current, self.switching_to) if bundle is not None}
