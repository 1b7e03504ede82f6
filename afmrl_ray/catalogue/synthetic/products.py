"""Products of the synthetic catalogue: their possible attributes, and families of near-identical siblings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

COLORS = {
    "red": (205, 38, 42),
    "blue": (38, 78, 200),
    "green": (34, 150, 68),
    "yellow": (238, 208, 48),
    "black": (30, 30, 34),
    "white": (244, 244, 242),
    "pink": (242, 140, 180),
    "orange": (240, 130, 32),
    "purple": (126, 58, 170),
    "brown": (118, 76, 42),
}
PATTERNS = ("solid", "striped", "dotted", "checked")
FORMS = {
    "shirt": ("neckline", ("v-neck", "round-neck", "collared")),
    "mug": ("handle", ("no-handle", "left-handle", "right-handle")),
    "bag": ("strap", ("short-strap", "long-strap", "no-strap")),
    "lamp": ("shade", ("cone-shade", "round-shade", "square-shade")),
    "shoe": ("heel", ("flat-heel", "block-heel", "high-heel")),
    "bottle": ("cap", ("screw-cap", "pump-cap", "cork-cap")),
}
TRIMS = ("gold", "silver", "no-trim")
MATERIALS = {
    "shirt": ("cotton", "linen", "wool"),
    "mug": ("ceramic", "glass", "steel"),
    "bag": ("leather", "canvas", "nylon"),
    "lamp": ("wood", "brass", "paper"),
    "shoe": ("leather", "suede", "rubber"),
    "bottle": ("glass", "steel", "plastic"),
}
CAPACITIES = ("small", "medium", "large")
VISIBLE = ("color", "pattern", "form", "logo", "trim")
HIDDEN = ("material", "capacity")


@dataclass(frozen=True)
class Product:
    """A product; its attributes together are its identity."""

    category: str
    color: str
    pattern: str
    form: str
    logo: str
    trim: str
    material: str
    capacity: str

    def attributes(self) -> dict[str, str]:
        """Attributes in canonical order; the form is named after the category (neckline, handle, ...)."""
        return {
            "color": self.color,
            "pattern": self.pattern,
            FORMS[self.category][0]: self.form,
            "logo": self.logo,
            "trim": self.trim,
            "material": self.material,
            "capacity": self.capacity,
        }


def choices(category: str, field: str, color: str) -> list[str]:
    """Possible values of a field; the logo's colour always differs from the body's."""
    values = {
        "color": tuple(COLORS),
        "pattern": PATTERNS,
        "form": FORMS[category][1],
        "logo": tuple(name for name in COLORS if name != color),
        "trim": TRIMS,
        "material": MATERIALS[category],
        "capacity": CAPACITIES,
    }
    return list(values[field])


def random_product(draw: np.random.Generator) -> Product:
    """A product with random attributes."""
    category = str(draw.choice(list(FORMS)))
    color = str(draw.choice(list(COLORS)))
    fields = ("pattern", "form", "logo", "trim", "material", "capacity")
    return Product(category, color, **{f: str(draw.choice(choices(category, f, color))) for f in fields})


def sibling(product: Product, draw: np.random.Generator) -> Product:
    """A random product that differs from `product` in exactly one attribute."""
    field = str(draw.choice([*VISIBLE, *HIDDEN]))
    own = getattr(product, field)
    values = [value for value in choices(product.category, field, product.color) if value != own]
    if field == "color":
        values = [value for value in values if value != product.logo]
    return replace(product, **{field: str(draw.choice(values))})


def families(count: int, siblings: int, draw: np.random.Generator, seen: set[Product]) -> list[list[Product]]:
    """`count` new products in families; every member but the first differs from another member in one attribute.

    Args:
        count: number of products.
        siblings: products of a family.
        draw: random generator.
        seen: products that exist already; new ones are added.
    """
    found: list[list[Product]] = []
    while sum(len(family) for family in found) < count:
        first = random_product(draw)
        if first in seen:
            continue
        family = [first]
        seen.add(first)
        while len(family) < siblings:
            other = sibling(family[int(draw.integers(len(family)))], draw)
            if other not in seen:
                seen.add(other)
                family.append(other)
        found.append(family)
    found[-1] = found[-1][: len(found[-1]) - (sum(len(family) for family in found) - count)]
    return found
