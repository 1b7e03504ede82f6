"""Catalogues: schema, reading, staging, importers, images, the synthetic catalogue."""

from __future__ import annotations

from afmrl_ray.catalogue.reading import Catalogue, check_table, open_catalogue
from afmrl_ray.catalogue.schema import Item, write_catalogue
from afmrl_ray.catalogue.staging import CatalogueRef, StagedCatalogue, stage
from afmrl_ray.catalogue.synthetic import make_catalogue
from afmrl_ray.catalogue.table import CatalogueTable, check_positives

__all__ = [
    "Catalogue",
    "CatalogueRef",
    "CatalogueTable",
    "Item",
    "StagedCatalogue",
    "check_positives",
    "check_table",
    "make_catalogue",
    "open_catalogue",
    "stage",
    "write_catalogue",
]
