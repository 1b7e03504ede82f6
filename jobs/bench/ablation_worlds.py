"""What the ablation of stage 1's loss compares, and on which catalogues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from afmrl_ray.cit.stage_functions import attribute_rows

from afmrl_ray.attributes.store import write_attributes
from afmrl_ray.attributes.teachers import ColumnTeacher, TeacherItem
from afmrl_ray.attributes.text import InvalidAttributes, format_attributes
from afmrl_ray.catalogue import CatalogueRef, make_catalogue, open_catalogue, write_catalogue
from afmrl_ray.catalogue.staging import stage
from afmrl_ray.config import Config, validate

PICTURE = {"min_pixels": 3136, "max_pixels": 3136}
TINY = {"hidden_size": 64, "num_layers": 2, "encoder_pretrain_steps": 0, "pretrain_products": 1}
OFF = {"lexical": {"enabled": False}, "mask": {"enabled": False}}
TEMPERATURE = 4.0
"""Divisor of BM25 for scale `temperature`: its values go from 0 to about 30, and tanh is flat from 2 on."""


def _weights(positive: str, scale: str) -> dict[str, Any]:
    return {"enabled": True, "positive_weight": positive, "scale": scale, "temperature": TEMPERATURE}


READINGS: dict[str, dict[str, Any]] = {
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
"""Settings of `agcl` by what the table calls them."""

HARDEST = ("plain InfoNCE", "weights one, raw", "mask by candidate", "mask by attributes", "weights one, raw + mask")
"""Readings that are tried with batches of sibling families too, where a quarter of the products is there twice."""

BATCHES: dict[str, dict[str, Any]] = {
    "uniform": {"batch_grouping": {"fraction": 0.0}},
    "half of one category": {"batch_grouping": {"fraction": 0.5, "column": "category"}},
}
FAMILIES = {"batch_grouping": {"fraction": 0.5, "column": "family_id"}}


@dataclass(frozen=True)
class Cell:
    """A training that is measured: kind of batches, reading, seed, and the settings of `agcl` that they mean."""

    batches: str
    reading: str
    seed: int
    agcl: dict[str, Any]


@dataclass(frozen=True)
class World:
    """A catalogue with its attributes, as workers open it.

    Attributes:
        name: of the world.
        values: config without what a cell sets.
        reference: the catalogue.
        attributes: path of the attribute table.
        start_steps: of the common start: all weights, the tower too, by plain InfoNCE.
        steps: of each cell: the language model by a reading, the tower frozen.
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
        """All cells, those of a seed together; other temperatures for plain InfoNCE on uniform batches."""
        found = []
        for seed in range(seeds):
            found += [
                Cell(kind, reading, seed, {**READINGS[reading], **BATCHES[kind]})
                for kind, reading in product(BATCHES, READINGS)
            ]
            if self.families:
                found += [
                    Cell("half of sibling families", name, seed, {**READINGS[name], **FAMILIES}) for name in HARDEST
                ]
            found += [
                Cell("uniform", f"plain, temperature {value:g}", seed, {**OFF, "temperature": value})
                for value in temperatures
            ]
        return found

    def config(self, seed: int, **agcl: Any) -> Config:
        values = {**self.values, "run": {"seed": seed}, "agcl": {**self.values["agcl"], **agcl}}
        return validate(values)


def synthetic(folder: Path) -> World:
    """The `bench` catalogue; a quarter of the train products is listed twice under different product ids."""
    values = {
        "synthetic": {"preset": "bench", "duplicate_fraction": 0.25},
        "tiny": TINY,
        "encoder": {"image": PICTURE},
        "agcl": {"batch_size": 96, "temperature": 0.05},
        "evaluation": {
            "primary_protocol": "with_attributes",
            "protocols": [
                {"kind": "retrieval", "name": "with_attributes"},
                {"kind": "retrieval", "name": "without attributes", "with_attributes": "none"},
            ],
        },
    }
    path = folder / "synthetic.parquet"
    if not path.exists():
        write_catalogue(make_catalogue(validate(values).synthetic), str(path))
    return _world("synthetic", values, path, folder, names=None, start_steps=800, steps=100, families=True)


def grocery(folder: Path, catalogue: Path) -> World:
    """Photographs of groceries (protocol G2); attributes decide weights and masks only, since they name the class."""
    train = {"split": ["train"], "inputs": "image"}
    values = {
        "tiny": TINY,
        "encoder": {"image": PICTURE},
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
    return _world("grocery", values, catalogue, folder, names=names, start_steps=800, steps=100)


def _world(
    name: str,
    values: dict[str, Any],
    path: Path,
    folder: Path,
    *,
    names: tuple[str, ...] | None,
    start_steps: int,
    steps: int,
    families: bool = False,
) -> World:
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
    return World(name, values, reference, attributes, start_steps, steps, families)
