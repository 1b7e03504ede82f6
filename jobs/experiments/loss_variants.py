"""The variants of stage 1's loss, the kinds of batches and the datasets that the ablation of the loss compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from afmrl_ray.attributes.store import write_attributes
from afmrl_ray.attributes.teachers import ColumnTeacher, TeacherItem
from afmrl_ray.attributes.text import InvalidAttributes, format_attributes
from afmrl_ray.catalogue import CatalogueRef, make_catalogue, open_catalogue, write_catalogue
from afmrl_ray.catalogue.staging import stage
from afmrl_ray.cit.stages.attributes import attribute_rows
from afmrl_ray.config import Config, validate

IMAGE = {"min_pixels": 3136, "max_pixels": 3136}
TINY = {"hidden_size": 64, "num_layers": 2, "encoder_pretrain_steps": 0, "pretrain_products": 1}
OFF = {"lexical": {"enabled": False}, "mask": {"enabled": False}}
TEMPERATURE = 4.0
"""Divisor of BM25 scores for scale `temperature`: scores are between 0 and about 30, and tanh saturates above 2."""


def _weights(positive: str, scale: str) -> dict[str, Any]:
    return {"enabled": True, "positive_weight": positive, "scale": scale, "temperature": TEMPERATURE}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain InfoNCE": OFF,
    **{
        f"weights {positive}, {scale}": {**OFF, "lexical": _weights(positive, scale)}
        for positive in ("bm25", "one")
        for scale in ("raw", "self", "temperature")
    },
    "mask by candidate": {**OFF, "mask": {"enabled": True, "kind": "candidate"}},
    "mask by attributes": {**OFF, "mask": {"enabled": True, "kind": "attributes"}},
    "weights bm25, raw + mask": {"lexical": _weights("bm25", "raw"), "mask": {"enabled": True, "kind": "candidate"}},
    "weights one, raw + mask": {"lexical": _weights("one", "raw"), "mask": {"enabled": True, "kind": "candidate"}},
}
"""Settings of `agcl` by name in the table."""

HARD_VARIANTS = (
    "plain InfoNCE",
    "weights one, raw",
    "mask by candidate",
    "mask by attributes",
    "weights one, raw + mask",
)
"""Variants that are also trained with batches of sibling families, where a quarter of the products occurs twice."""

BATCHES: dict[str, dict[str, Any]] = {
    "uniform": {"batch_grouping": {"fraction": 0.0}},
    "half of one category": {"batch_grouping": {"fraction": 0.5, "column": "category"}},
}
FAMILIES = {"batch_grouping": {"fraction": 0.5, "column": "family_id"}}


@dataclass(frozen=True)
class Cell:
    """One training: kind of batches, variant, seed, and the settings of `agcl` that follow from them."""

    batches: str
    variant: str
    seed: int
    agcl: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """A catalogue with its attributes, as workers open it.

    Attributes:
        name: name in tables.
        values: config without the settings of a cell.
        reference: the catalogue.
        attributes: path of the attribute table.
        start_steps: steps of the common start, in which all weights are trained with plain InfoNCE.
        steps: steps of each cell, in which the language model is trained and the vision tower is frozen.
        families: whether there are families of near-identical products, for the hardest batches.
    """

    name: str
    values: dict[str, Any]
    reference: CatalogueRef
    attributes: str
    start_steps: int
    steps: int
    families: bool = False

    def cells(self, seeds: int, temperatures: Sequence[float]) -> list[Cell]:
        """All cells, ordered by seed; `temperatures` are further ones for plain InfoNCE with uniform batches."""
        found = []
        for seed in range(seeds):
            found += [
                Cell(kind, variant, seed, {**VARIANTS[variant], **BATCHES[kind]})
                for kind, variant in product(BATCHES, VARIANTS)
            ]
            if self.families:
                kind = "half of sibling families"
                found += [Cell(kind, name, seed, {**VARIANTS[name], **FAMILIES}) for name in HARD_VARIANTS]
            found += [
                Cell("uniform", f"plain, temperature {value:g}", seed, {**OFF, "temperature": value})
                for value in temperatures
            ]
        return found

    def config(self, seed: int, **agcl: Any) -> Config:
        """The config of one training."""
        values = {**self.values, "run": {"seed": seed}, "agcl": {**self.values["agcl"], **agcl}}
        return validate(values)


def synthetic(folder: Path) -> Dataset:
    """The `bench` catalogue; a quarter of the training products occurs twice under different product IDs."""
    values = {
        "synthetic": {"preset": "bench", "duplicate_fraction": 0.25},
        "tiny": TINY,
        "encoder": {"image": IMAGE},
        "agcl": {"batch_size": 96, "temperature": 0.05},
        "evaluation": {
            "primary_protocol": "with_attributes",
            "protocols": [
                {"kind": "retrieval", "name": "with attributes"},
                {"kind": "retrieval", "name": "without attributes", "with_attributes": "none"},
            ],
        },
    }
    path = folder / "synthetic.parquet"
    if not path.exists():
        write_catalogue(make_catalogue(validate(values).synthetic), str(path))
    return _dataset("synthetic", values, path, folder, names=None, start_steps=800, steps=100, families=True)


def grocery(folder: Path, catalogue: Path) -> Dataset:
    """Photographs of groceries (protocol G2); attributes are not in the input, since they name the class."""
    train = {"split": ["train"], "inputs": "image"}
    values = {
        "tiny": TINY,
        "encoder": {"image": IMAGE},
        "agcl": {
            "batch_size": 64,
            "temperature": 0.05,
            "pairs": [{"query": train, "positive": train}],
            "attribute_dropout": {"query": 1.0, "positive": 1.0},
        },
        "evaluation": {
            "primary_protocol": "G2",
            "protocols": [
                {
                    "kind": "retrieval",
                    "name": "G2",
                    "query": {"split": ["test"], "role": None, "inputs": "image"},
                    "gallery": {**train, "role": None},
                    "with_attributes": "none",
                }
            ],
        },
    }
    names = ("section", "type", "country", "manufacturer", "volume")
    return _dataset("grocery", values, catalogue, folder, names=names, start_steps=800, steps=100)


def _dataset(
    name: str,
    values: dict[str, Any],
    path: Path,
    folder: Path,
    *,
    names: tuple[str, ...] | None,
    start_steps: int,
    steps: int,
    families: bool = False,
) -> Dataset:
    settings = {"path": str(path), "cache_dir": str(folder / "staging")}
    values = {**values, "catalogue": settings}
    config = validate(values)
    catalogue = open_catalogue(str(path), config=config.catalogue)
    stage(catalogue, config.catalogue)
    reference = CatalogueRef(str(path), config.catalogue, catalogue.fingerprint)
    staged = reference.open()
    teacher = ColumnTeacher(config.generator.max_attributes, names=names)
    items = [staged.item(row) for row in range(len(staged))]
    answers = teacher.annotate([TeacherItem(item.item_id, item.title or "", item.attributes, bytes) for item in items])
    found = [("", a.reason) if isinstance(a, InvalidAttributes) else (format_attributes(a), "") for a in answers]
    attributes = str(folder / f"{name}-attributes.parquet")
    write_attributes(
        attributes, attribute_rows(staged.column("item_id"), np.arange(len(staged)), found), fingerprint=name
    )
    return Dataset(name, values, reference, attributes, start_steps, steps, families)
