"""Texts of the synthetic catalogue: sellers' titles, and a teacher's attributes with random errors."""

from __future__ import annotations

import numpy as np

from afmrl_ray.catalogue.synthetic.products import HIDDEN, VISIBLE, Product, choices
from afmrl_ray.config.catalogue import SyntheticConfig

SYNONYMS = {
    "shirt": ("shirt", "tee", "top"),
    "mug": ("mug", "cup"),
    "bag": ("bag", "tote"),
    "lamp": ("lamp", "light"),
    "shoe": ("shoe", "footwear"),
    "bottle": ("bottle", "flask"),
    "red": ("red", "crimson"),
    "blue": ("blue", "navy"),
    "striped": ("striped", "stripes"),
    "dotted": ("dotted", "dots"),
    "checked": ("checked", "plaid"),
    "small": ("small", "mini"),
    "large": ("large", "xl"),
}
PROMOTION = (
    "new", "hot", "sale", "2026", "free", "shipping", "best", "quality", "official", "store", "trendy", "classic",
    "gift", "deal", "premium", "original",
)  # fmt: skip
MOODS = ("cheerful", "honest", "busy", "proud")
DELIVERIES = ("fast", "free", "tracked")


def title(product: Product, draw: np.random.Generator, config: SyntheticConfig) -> str:
    """A title: some of the attributes, as synonyms, and promotional words, in random order."""
    words = [value for field in VISIBLE if field != "logo" and draw.random() < config.title_mention_rate
             if (value := getattr(product, field)) not in ("solid", "no-trim")]  # fmt: skip
    words += [getattr(product, field) for field in HIDDEN if draw.random() < config.title_hidden_mention_rate]
    if draw.random() < 0.9:
        words.append(product.category)
    words = [str(draw.choice(SYNONYMS.get(word, (word,)))) for word in words]
    words += draw.choice(PROMOTION, size=int(draw.integers(1, 5)), replace=False).tolist()
    draw.shuffle(words)
    return " ".join(words)


def teacher_attributes(
    product: Product, background: str, draw: np.random.Generator, config: SyntheticConfig
) -> dict[str, str]:
    """A teacher's attributes of an item: some are wrong, some are missing, and some are irrelevant."""
    pairs: list[tuple[str, str]] = []
    missing: dict[str, float] = dict(config.teacher_missing_rates.items())
    for (name, value), field in zip(product.attributes().items(), (*VISIBLE, *HIDDEN), strict=True):
        if draw.random() < missing.get(field, config.teacher_missing_rate):
            continue
        if draw.random() < config.teacher_error_rate:
            value = str(draw.choice([v for v in choices(product.category, field, product.color) if v != value]))
        pairs.append((name, value))
    irrelevant = (
        ("background", background),
        ("mood", str(draw.choice(MOODS))),
        ("delivery", str(draw.choice(DELIVERIES))),
    )
    for pair in irrelevant:
        if draw.random() < config.teacher_irrelevant_rate:
            pairs.insert(int(draw.integers(len(pairs) + 1)), pair)
    return dict(pairs)
