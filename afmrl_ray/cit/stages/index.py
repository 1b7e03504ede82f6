"""The stage that makes a round servable: the gallery's FAISS index, and the table of its items."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.cit.spec import CATALOGUE, StageContext, StageSpec
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.errors import ConfigError
from afmrl_ray.retrieval.ann import build_index, chosen_kind, open_index, recall_against_exact, save_index
from afmrl_ray.retrieval.embed import EncoderRef, View, embed_rows
from afmrl_ray.retrieval.item_table import ITEMS, VECTORS, ItemRecord, thumbnail, write_items
from afmrl_ray.runs import StageName, StageOutcome
from afmrl_ray.training.cluster import pool_demand

log = logging.getLogger(__name__)

_RECALL_AT = 10


def declare_index(config: Config, number: int) -> StageSpec:
    return StageSpec(
        StageName("index", number),
        index_stage,
        reads=("run", "encoder", "index", "evaluation.pool"),
        upstream={
            "catalogue": CATALOGUE,
            "encoder": StageName("agcl", number),
            "attributes": StageName("attributes", number + 1),
        },
        resources=(pool_demand(config.evaluation.pool),),
        parameters={"gallery": index_gallery(config).fingerprinted()},
    )


def index_gallery(config: Config) -> ItemSelector:
    """The items that are served.

    Raises:
        ConfigError: none are named, and the primary protocol is no retrieval protocol.
    """
    if config.index.gallery is not None:
        return config.index.gallery
    primary = next(p for p in config.evaluation.protocols if p.name == config.evaluation.primary_protocol)
    if not isinstance(primary, RetrievalProtocol):
        raise ConfigError("index.gallery: the primary protocol has no gallery; name the items that are searched")
    return primary.gallery


def index_stage(context: StageContext) -> StageOutcome:
    """Embeds the gallery with its attributes and builds the index and the item table that are served."""
    config, catalogue = context.config, context.catalogue.open()
    gallery = ItemSelector.model_validate(context.parameters["gallery"])
    rows, view = catalogue.rows(gallery), View(gallery.inputs, gallery.title_columns, True)
    encoder = EncoderRef(context.output("encoder", "model"), config.encoder)
    table = context.output("attributes", "attributes")
    vectors = embed_rows({view: rows}, encoder, context.catalogue, attributes=table, pool=config.evaluation.pool)[view]
    text_of = read_attributes(table).text
    return write_index(config, catalogue, gallery, rows, vectors, text_of, context.directory)


def write_index(
    config: Config,
    catalogue: StagedCatalogue,
    gallery: ItemSelector,
    rows: np.ndarray,
    vectors: np.ndarray,
    text_of: Callable[[str], str],
    directory: str,
) -> StageOutcome:
    """Build the index of catalogue rows [N] with vectors [N, D] and write it, and what is shown of them.

    Args:
        text_of: attribute text of an item id.
    """
    with tempfile.TemporaryDirectory() as local:
        path = os.path.join(local, VECTORS)
        save_index(build_index(vectors, config.index), path)
        recall = recall_against_exact(open_index(path), vectors, config.index, k=_RECALL_AT, seed=config.run.seed)
        records = _records(catalogue, rows, text_of, gallery, config.index.thumbnail_px)
        write_items(os.path.join(local, ITEMS), records)
        storage.copy_dir(local, directory)
    kind = chosen_kind(config.index, len(rows))
    log.info("index: %d items, %s, recall@%d against exact %.4f", len(rows), kind, _RECALL_AT, recall)
    metrics = {
        "items": len(rows),
        "dimensions": int(vectors.shape[1]),
        "kind": kind,
        f"recall_at_{_RECALL_AT}": recall,
        "inputs": gallery.inputs,
    }
    return StageOutcome({"vectors": VECTORS, "items": ITEMS}, metrics)


def _records(
    catalogue: StagedCatalogue,
    rows: np.ndarray,
    text_of: Callable[[str], str],
    gallery: ItemSelector,
    thumbnail_px: int,
) -> Iterator[ItemRecord]:
    for row in tqdm(rows.tolist(), desc="index: items", unit="item", mininterval=1, disable=None):
        item = catalogue.item(row)
        title = catalogue.title(row, gallery.title_columns) or item.title or ""
        small = thumbnail(catalogue.image(row), thumbnail_px)
        yield ItemRecord(item.item_id, title, item.category, item.product_id, text_of(item.item_id), small)
