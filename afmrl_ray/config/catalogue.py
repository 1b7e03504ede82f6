"""Settings of what is sold: the catalogue read, the synthetic one made, and sides cut out of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from afmrl_ray.config.base import Section

Inputs = Literal["image", "text", "both"]


class CatalogueConfig(Section):
    """The catalogue that a run reads."""

    runtime_only = frozenset({"path", "cache_dir"})

    path: str | None = None
    """Parquet file or directory, local or URI; none = the run makes the synthetic catalogue first."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """Share of rows that may be quarantined before the job stops."""
    max_image_pixels: int = Field(64_000_000, gt=0)
    """Pixels an image may have; a larger one is taken for a decompression bomb and quarantined."""
    cache_dir: str | None = None
    """Local folder for the memory-mapped copy that workers read by row; none = below the system's temporary folder."""


class SyntheticConfig(Section):
    """The synthetic catalogue: families of near-identical products, listed several times each.

    A field left at none takes the value of the preset.
    """

    preset: Literal["tiny", "demo", "bench"] = "demo"
    """Size: `tiny` for tests, `demo` for two rounds in minutes, `bench` with at least 2,000 test queries."""
    seed: int = 7
    """Everything about the catalogue is a function of this number and the fields below."""
    train_products: int | None = Field(None, gt=0)
    """Products of split train."""
    val_products: int | None = Field(None, gt=0)
    """Products of split val."""
    test_products: int | None = Field(None, gt=0)
    """Products of split test."""
    items_per_product: int | None = Field(None, ge=2)
    """Items of each product; in val and test the first is the query and the others are its positives."""
    siblings_per_family: int = Field(6, ge=1)
    """Products of a family; each differs from another one of it in exactly one attribute."""
    duplicate_fraction: float = Field(0.08, ge=0, le=0.5)
    """Share of train products listed again under another product_id: the false negatives that a mask must find."""
    title_mention_rate: float = Field(0.35, ge=0, le=1)
    """Chance that a title names a visible attribute."""
    title_hidden_mention_rate: float = Field(0.8, ge=0, le=1)
    """Chance that a title names an attribute that images do not show (material, capacity)."""
    teacher_error_rate: float = Field(0.1, ge=0, le=1)
    """Chance that the teacher gives an attribute a wrong value."""
    teacher_missing_rate: float = Field(0.1, ge=0, le=1)
    """Chance that the teacher leaves an attribute out."""
    teacher_irrelevant_rate: float = Field(0.5, ge=0, le=1)
    """Chance of each irrelevant pair of the teacher (background, seller's mood)."""
    image_px: int = Field(112, ge=32)
    """Side of the square images, pixels."""


class ItemSelector(Section):
    """One side of retrieval: which rows of the catalogue, and what of each the encoder sees."""

    split: tuple[str, ...] = ("test",)
    """Rows whose `split` is one of these."""
    role: str | None = None
    """Rows whose `role` is this; none = any."""
    where: dict[str, str] = Field(default_factory=dict)
    """Further columns and the value that a row must have in each."""
    inputs: Inputs = "both"
    """What of a row goes to the model: its image, its title, or both."""
    title_columns: tuple[str, ...] = ("title",)
    """Columns whose texts, joined by a space, are the title that the model reads."""
