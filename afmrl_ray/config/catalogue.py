"""Settings of catalogues: reading one, generating the synthetic one, and selecting items."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from afmrl_ray.config.base import Section

Inputs = Literal["image", "text", "both"]
Rate = Annotated[float, Field(ge=0, le=1)]
ProductField = Literal["color", "pattern", "form", "logo", "trim", "material", "capacity"]


class CatalogueConfig(Section):
    """The catalogue that a run reads; `catalogue.schema` lists its columns."""

    runtime_only = frozenset({"path", "cache_dir"})

    path: str | None = None
    """Parquet file or directory, local or URI; none = the run generates the synthetic catalogue first."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """Largest fraction of rows that may be quarantined; above it the job stops with an error."""
    max_image_pixels: int = Field(64_000_000, gt=0)
    """Largest number of pixels of an image; rows with larger images (decompression bombs) are quarantined."""
    cache_dir: str | None = None
    """Local folder of the memory-mapped copy that workers read; none = a folder below the system's temporary folder."""


class SyntheticConfig(Section):
    """The synthetic catalogue: families of near-identical products, with several items each.

    Fields that are none take the value of the preset.
    """

    preset: Literal["tiny", "demo", "bench"] = "demo"
    """Size: `tiny` for tests, `demo` for two rounds in minutes, `bench` with at least 2,000 test queries."""
    seed: int = 7
    """Seed of all random choices; equal seeds and settings give equal catalogues."""
    train_products: int | None = Field(None, gt=0)
    """Number of products in split train."""
    val_products: int | None = Field(None, gt=0)
    """Number of products in split val."""
    test_products: int | None = Field(None, gt=0)
    """Number of products in split test."""
    items_per_product: int | None = Field(None, ge=2)
    """Number of items of each product; in val and test the first is the query and the others are its positives."""
    siblings_per_family: int = Field(6, ge=1)
    """Number of products in a family; each differs from another one of its family in exactly one attribute."""
    duplicate_fraction: float = Field(0.08, ge=0, le=0.5)
    """Fraction of train products with a duplicate under another product_id: the false negatives for the mask."""
    title_mention_rate: float = Field(0.35, ge=0, le=1)
    """Probability that a title contains a given visible attribute."""
    title_hidden_mention_rate: float = Field(0.8, ge=0, le=1)
    """Probability that a title contains a given attribute that images do not show (material, capacity)."""
    teacher_error_rate: float = Field(0.1, ge=0, le=1)
    """Probability that the teacher has a wrong value for a given attribute."""
    teacher_missing_rate: float = Field(0.1, ge=0, le=1)
    """Probability that the teacher omits a given attribute."""
    teacher_missing_rates: dict[ProductField, Rate] = Field(default_factory=dict)
    """The same for single attributes, in place of `teacher_missing_rate`: teachers leave out what they think minor."""
    teacher_irrelevant_rate: float = Field(0.5, ge=0, le=1)
    """Probability of each irrelevant pair of the teacher (background, mood, delivery)."""
    image_px: int = Field(112, ge=32)
    """Width and height of the images, pixels."""


class ItemSelector(Section):
    """Selects rows of the catalogue, and which of their parts the model receives."""

    split: tuple[str, ...] = ("test",)
    """Values of column `split` that match."""
    role: str | None = None
    """Value of column `role` that matches; none = any."""
    where: dict[str, str] = Field(default_factory=dict)
    """Values that must match in further columns, by column."""
    inputs: Inputs = "both"
    """Parts of an item that the model receives: its image, its title (`text`), or both."""
    title_columns: tuple[str, ...] = ("title",)
    """Columns whose texts, joined by a space, form the title."""
