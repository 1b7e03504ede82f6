"""Stages that write attribute tables: the teacher's labels, the generator's attributes, and the ground truth's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.attributes.quality import quality
from afmrl_ray.attributes.store import AttributeRow, AttributeStore, read_attributes, write_attributes
from afmrl_ray.attributes.teachers import TeacherItem, make_teacher
from afmrl_ray.attributes.text import InvalidAttributes, format_attributes, normalise_attributes, select_attributes
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.catalogue.values import parse_source_attributes
from afmrl_ray.cit.spec import CATALOGUE, StageContext, StageSpec
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.config.teacher import ColumnTeacherConfig
from afmrl_ray.errors import CatalogueError, ConfigError
from afmrl_ray.models.annotate import GeneratorRef, annotate_rows
from afmrl_ray.runs import StageName, StageOutcome
from afmrl_ray.training.cluster import pool_demand

FILE = "attributes.parquet"
_QUALITY_READS = ("annotate.items", "annotate.ground_truth_column")


def declare_labels(config: Config) -> StageSpec:
    return _declare_labels(config, "labels", "distill.items", distillation_items)


def declare_pair_labels(config: Config) -> StageSpec:
    return _declare_labels(config, "labels-pairs", "agcl.pairs", pair_items)


def distillation_items(config: Config) -> list[ItemSelector]:
    """Items that the generator is distilled on."""
    return [config.distill.items]


def pair_items(config: Config) -> list[ItemSelector]:
    """Items of all training pairs of the encoder."""
    return [selector for pair in config.agcl.pairs for selector in (pair.query, pair.positive)]


def _declare_labels(config: Config, kind: str, items: str, selectors: Any) -> StageSpec:
    asks_model = config.teacher.kind == "model"
    return StageSpec(
        StageName(kind),
        partial(labels_stage, selectors=selectors),
        reads=("teacher", items, *(("generator", "annotate.pool") if asks_model else ("generator.max_attributes",))),
        upstream={"catalogue": CATALOGUE},
        resources=(pool_demand(config.annotate.pool),) if asks_model else (),
        resumable=True,
    )


def labels_stage(context: StageContext, *, selectors: Any) -> StageOutcome:
    """Collects the teacher's attributes of the items that are trained on.

    Args:
        selectors: gives the item selectors of a config.
    """
    config, catalogue = context.config, context.catalogue.open()
    rows = catalogue.rows_of_any(selectors(config))
    if config.teacher.kind == "model":
        generator = GeneratorRef(config.teacher.path, config.generator)
        found = annotate_rows(rows, generator, context.catalogue, pool=config.annotate.pool)
        source = storage.digest({"teacher": config.teacher.path})
    else:
        # Outside the attempts, so that neither stage ever asks a paid endpoint the same question twice.
        cache = storage.join(storage.parent(storage.parent(context.directory)), "labels", "answers")
        teacher = make_teacher(config.teacher, cache_dir=cache, max_attributes=config.generator.max_attributes)
        asked = [
            TeacherItem(item.item_id, item.title or "", item.attributes, partial(catalogue.image_bytes, item.row))
            for item in (catalogue.item(int(row)) for row in rows)
        ]
        answers = teacher.annotate(asked)
        found = [("", a.reason) if isinstance(a, InvalidAttributes) else (format_attributes(a), "") for a in answers]
        source = storage.digest(config.teacher.fingerprinted())
    store = _write(context, rows, found, fingerprint=source)
    if store.invalid_fraction == 1.0:
        raise CatalogueError(f"teacher: gave no valid attributes for any of {len(rows)} items")
    return StageOutcome({"attributes": FILE}, attribute_metrics(store))


def declare_attributes(config: Config, number: int) -> StageSpec:
    return StageSpec(
        StageName("attributes", number),
        attributes_stage,
        reads=("generator", "annotate"),
        upstream={"catalogue": CATALOGUE, "generator": generator_before(number)},
        resources=(pool_demand(config.annotate.pool),),
    )


def generator_before(number: int) -> StageName:
    """The stage that made the generator with which a round begins."""
    return StageName("rar", number - 1) if number else StageName("distill")


def attributes_stage(context: StageContext) -> StageOutcome:
    """Writes the attributes of all items with the generator as it is before the round."""
    config, stage = context.config, context.upstream["generator"]
    rows = context.catalogue.open().rows(config.annotate.items)
    generator = GeneratorRef(stage.output("model"), config.generator)
    found = annotate_rows(rows, generator, context.catalogue, pool=config.annotate.pool)
    return _table(context, rows, found, fingerprint=stage.fingerprint)


def declare_oracle(config: Config) -> StageSpec:
    return StageSpec(
        StageName("oracle"),
        oracle_stage,
        reads=_QUALITY_READS,
        upstream={"catalogue": CATALOGUE},
        parameters={"names": taught_names(config)},
    )


def taught_names(config: Config) -> list[str] | None:
    """Attribute names to which the teacher is limited; none = any. A source may have others, which are not taught."""
    names = config.teacher.names if isinstance(config.teacher, ColumnTeacherConfig) else None
    return None if names is None else list(names)


def oracle_stage(context: StageContext) -> StageOutcome:
    """Writes the ground-truth attributes, limited to the names that the teacher uses: a generator without errors."""
    catalogue, names = context.catalogue.open(), context.parameters["names"]
    annotate = context.config.annotate
    rows = catalogue.rows(annotate.items)
    truth = catalogue.column(annotate.ground_truth_column)
    source = [select_attributes(parse_source_attributes(truth[row]), names) for row in rows.tolist()]
    texts = [format_attributes(normalise_attributes(attributes)) for attributes in source]
    found = [(text, "" if text else "empty") for text in texts]
    fingerprint = storage.digest({"truth": annotate.ground_truth_column, "names": names})
    return _table(context, rows, found, fingerprint=fingerprint)


def declare_query_attributes(config: Config, number: int) -> StageSpec:
    return StageSpec(
        StageName("query-attributes", number),
        query_attributes_stage,
        reads=(*_QUALITY_READS, "evaluation.protocols"),
        upstream={
            "catalogue": CATALOGUE,
            "gallery": StageName("attributes", number),
            "queries": StageName("attributes", number + 1),
        },
    )


def query_attributes_stage(context: StageContext) -> StageOutcome:
    """Takes the queries' attributes from after the round's RAR and all others from before it: the gallery stays.

    Raises:
        ConfigError: an item is such a query and also in a gallery with attributes.
    """
    config, catalogue = context.config, context.catalogue.open()
    items = catalogue.column("item_id")
    protocols = [each for each in config.evaluation.protocols if isinstance(each, RetrievalProtocol)]
    queries = [each.query for each in protocols if each.with_attributes != "none"]
    galleries = [each.gallery for each in protocols if each.with_attributes == "both"]
    asked = catalogue.rows_of_any(queries) if queries else np.array([], dtype=np.int64)
    for gallery in galleries:
        if len(both := np.intersect1d(asked, catalogue.rows(gallery))):
            raise ConfigError(
                f"evaluation.protocols: item {items[int(both[0])]!r} is a query and in a gallery with attributes, "
                "so the gallery cannot stay as it was; leave one of the protocols out"
            )
    replaced = set(asked.tolist())
    before, after = (read_attributes(context.output(role, "attributes")) for role in ("gallery", "queries"))
    rows = catalogue.rows(config.annotate.items)
    texts = [(after if row in replaced else before).text(items[row]) for row in rows.tolist()]
    found = [(text, "" if text else "invalid") for text in texts]
    return _table(context, rows, found, fingerprint=context.upstream["queries"].fingerprint)


def _table(
    context: StageContext, rows: np.ndarray, found: Iterable[tuple[str, str]], *, fingerprint: str
) -> StageOutcome:
    """Write an attribute table and measure it against the ground truth."""
    store = _write(context, rows, found, fingerprint=fingerprint)
    return StageOutcome({"attributes": FILE}, generated_metrics(store, context.catalogue.open(), context.config))


def _write(
    context: StageContext, rows: np.ndarray, found: Iterable[tuple[str, str]], *, fingerprint: str
) -> AttributeStore:
    items = context.catalogue.open().column("item_id")
    write_attributes(context.path(FILE), attribute_rows(items, rows, found), fingerprint=fingerprint)
    return read_attributes(context.path(FILE))


def attribute_rows(items: Sequence[str], rows: np.ndarray, found: Iterable[tuple[str, str]]) -> list[AttributeRow]:
    """Rows of an attribute table from pairs of attribute text and reason of invalidity."""
    return [
        AttributeRow(items[int(row)], text, reason or None) for row, (text, reason) in zip(rows, found, strict=True)
    ]


def attribute_metrics(store: AttributeStore) -> dict[str, float]:
    """Mean length of an attribute table's valid texts, and its fraction of invalid ones."""
    length = store.mean_length
    return {"mean_pairs": length.pairs, "mean_words": length.words, "invalid_fraction": store.invalid_fraction}


def generated_metrics(store: AttributeStore, catalogue: StagedCatalogue, config: Config) -> dict[str, Any]:
    """`attribute_metrics`, and `quality` against the ground truth over the items that are never trained on.

    Raises:
        CatalogueError: there is no column `annotate.ground_truth_column`.
    """
    annotate = config.annotate
    truth, items, splits = (catalogue.column(name) for name in (annotate.ground_truth_column, "item_id", "split"))
    held_out = [row for row in catalogue.rows(annotate.items).tolist() if splits[row] != "train"]
    written = [store.get(items[row]) for row in held_out]
    source = [normalise_attributes(parse_source_attributes(truth[row])) for row in held_out]
    return {**attribute_metrics(store), "quality": quality(written, source)}
