"""What the stages do: each body writes below its attempt directory and says what it wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.agcl.train import AGCLJob, train_agcl
from afmrl_ray.attributes.quality import quality
from afmrl_ray.attributes.store import AttributeRow, AttributeStore, read_attributes, write_attributes
from afmrl_ray.attributes.teachers import TeacherItem, make_teacher
from afmrl_ray.attributes.text import InvalidAttributes, format_attributes, normalise_attributes, select_attributes
from afmrl_ray.catalogue import (
    Catalogue,
    CatalogueRef,
    StagedCatalogue,
    make_catalogue,
    open_catalogue,
    write_catalogue,
)
from afmrl_ray.catalogue.schema import parse_source_attributes
from afmrl_ray.cit.stages import Stage, StageOutcome
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.config.teacher import ColumnTeacherConfig
from afmrl_ray.distill.train import DistillJob, train_distill
from afmrl_ray.errors import CatalogueError, ConfigError
from afmrl_ray.models.annotate import GeneratorRef, annotate_rows
from afmrl_ray.rar.trainer import RARJob, train_rar
from afmrl_ray.retrieval.embed import EncoderRef, View, embed_rows, save_embeddings
from afmrl_ray.training.cluster import Demand, pool_demand, require_resources


def catalogue_stage_fn(config: Config, given: Catalogue | None, directory: str) -> StageOutcome:
    """Make the synthetic catalogue, or write down what was wrong with the given one."""
    outputs = {}
    if given is None:
        path = storage.join(directory, "catalogue.parquet")
        write_catalogue(make_catalogue(config.synthetic), path)
        outputs["catalogue"] = "catalogue.parquet"
        catalogue = open_catalogue(path, config=config.catalogue)
    else:
        catalogue = given
    catalogue.write_quarantine(storage.join(directory, "quarantine.parquet"))
    outputs["quarantine"] = "quarantine.parquet"
    return StageOutcome(outputs, {"fingerprint": catalogue.fingerprint, "counts": catalogue.counts})


def models_stage_fn(config: Config, catalogue: CatalogueRef, directory: str) -> StageOutcome:
    """Make the tiny checkpoints side by side, one Ray task each."""
    import ray

    from afmrl_ray.cit.tiny import make_tiny

    roles = [role for role in ("encoder", "generator") if getattr(config, role).path is None]
    require_resources("models", [Demand(1, {"CPU": 1})], wait_s=config.ray.wait_for_resources_s)
    task = ray.remote(num_cpus=1, max_retries=1)(make_tiny)
    losses = ray.get([task.remote(config, role, catalogue, storage.join(directory, role)) for role in roles])
    return StageOutcome({role: role for role in roles}, dict(zip(roles, losses, strict=True)))


def labels_stage_fn(
    config: Config, catalogue_ref: CatalogueRef, sides: Sequence[ItemSelector], directory: str
) -> StageOutcome:
    """Ask the teacher about the items of some sides."""
    catalogue = catalogue_ref.open()
    rows = catalogue.rows_of_any(sides)
    path = storage.join(directory, "attributes.parquet")
    if config.teacher.kind == "model":
        generator = GeneratorRef(config.teacher.path, config.generator)
        found = annotate_rows(rows, generator, catalogue_ref, pool=config.annotate.pool)
        source = storage.digest({"teacher": config.teacher.path})
    else:
        # Beside the attempts of `labels`, so that no stage and no change asks a paid endpoint the same thing again.
        cache = storage.join(storage.parent(storage.parent(directory)), "labels", "answers")
        teacher = make_teacher(config.teacher, cache_dir=cache, max_attributes=config.generator.max_attributes)
        asked = [
            TeacherItem(item.item_id, item.title or "", item.attributes, partial(catalogue.image_bytes, item.row))
            for item in (catalogue.item(int(row)) for row in rows)
        ]
        answers = teacher.annotate(asked)
        found = [("", a.reason) if isinstance(a, InvalidAttributes) else (format_attributes(a), "") for a in answers]
        source = storage.digest(config.teacher.fingerprinted())
    write_attributes(path, attribute_rows(catalogue.column("item_id"), rows, found), fingerprint=source)
    store = read_attributes(path)
    if store.invalid_fraction == 1.0:
        raise CatalogueError(f"teacher: gave no valid attributes for any of {len(rows)} items")
    return StageOutcome({"attributes": "attributes.parquet"}, attribute_metrics(store))


def attribute_rows(items: list[str], rows: np.ndarray, found: Iterable[tuple[str, str]]) -> list[AttributeRow]:
    """Rows of an attribute table from (text, reason of invalidity) pairs."""
    return [
        AttributeRow(items[int(row)], text, reason or None) for row, (text, reason) in zip(rows, found, strict=True)
    ]


def attribute_metrics(store: AttributeStore) -> dict[str, float]:
    """What the report says about an attribute table."""
    length = store.mean_length
    return {"mean_pairs": length.pairs, "mean_words": length.words, "invalid_fraction": store.invalid_fraction}


def distill_stage_fn(config: Config, catalogue: CatalogueRef, start: str, labels: str, directory: str) -> StageOutcome:
    metrics = train_distill(config, DistillJob(start, labels, catalogue, directory, "distill"))
    return StageOutcome({"model": "model"}, metrics)


def attributes_stage_fn(
    config: Config, catalogue_ref: CatalogueRef, generator: GeneratorRef, fingerprint: str, directory: str
) -> StageOutcome:
    catalogue = catalogue_ref.open()
    rows = catalogue.rows(config.annotate.items)
    pool = config.annotate.pool
    require_resources("attributes", [pool_demand(pool)], wait_s=config.ray.wait_for_resources_s)
    found = annotate_rows(rows, generator, catalogue_ref, pool=pool)
    path = storage.join(directory, "attributes.parquet")
    write_attributes(path, attribute_rows(catalogue.column("item_id"), rows, found), fingerprint=fingerprint)
    return StageOutcome(
        {"attributes": "attributes.parquet"}, generated_metrics(read_attributes(path), catalogue, config)
    )


def taught_names(config: Config) -> tuple[str, ...] | None:
    """Names that the teacher is limited to, or none; a source may know others, which no generator is taught."""
    return config.teacher.names if isinstance(config.teacher, ColumnTeacherConfig) else None


def oracle_stage_fn(config: Config, catalogue_ref: CatalogueRef, directory: str) -> StageOutcome:
    """What a generator that is never wrong would write: what the teacher names, of `annotate.ground_truth_column`."""
    catalogue, names = catalogue_ref.open(), taught_names(config)
    rows = catalogue.rows(config.annotate.items)
    truth = catalogue.column(config.annotate.ground_truth_column)
    source = [select_attributes(parse_source_attributes(truth[row]), names) for row in rows.tolist()]
    found = [format_attributes(normalise_attributes(attributes)) for attributes in source]
    path = storage.join(directory, "attributes.parquet")
    items = catalogue.column("item_id")
    written = attribute_rows(items, rows, [(text, "" if text else "empty") for text in found])
    write_attributes(
        path, written, fingerprint=storage.digest({"truth": config.annotate.ground_truth_column, "names": names})
    )
    return StageOutcome(
        {"attributes": "attributes.parquet"}, generated_metrics(read_attributes(path), catalogue, config)
    )


def query_attributes_stage_fn(
    config: Config, catalogue_ref: CatalogueRef, before: Stage, after: Stage, directory: str
) -> StageOutcome:
    """Attributes of what searches from one table, of all other items from another: a gallery that stays as it was.

    Args:
        before: attributes stage of the gallery.
        after: attributes stage of the queries of all retrieval protocols that show with attributes them.

    Raises:
        ConfigError: an item is such a query and in a gallery with attributes too.
    """
    catalogue = catalogue_ref.open()
    items = catalogue.column("item_id")
    protocols = [each for each in config.evaluation.protocols if isinstance(each, RetrievalProtocol)]
    queries = [each.query for each in protocols if each.with_attributes != "none"]
    galleries = [each.gallery for each in protocols if each.with_attributes == "both"]
    asked = catalogue.rows_of_any(queries) if queries else np.array([], dtype=np.int64)
    for side in galleries:
        if len(both := np.intersect1d(asked, catalogue.rows(side))):
            raise ConfigError(
                f"evaluation.protocols: item {items[int(both[0])]!r} is a query and in a gallery with attributes, "
                "so the gallery cannot stay as it was; leave one of the protocols out"
            )
    anew = set(asked.tolist())
    old, new = (read_attributes(stage.output("attributes")) for stage in (before, after))
    rows = catalogue.rows(config.annotate.items)
    texts = [(new if row in anew else old).text(items[row]) for row in rows.tolist()]
    path = storage.join(directory, "attributes.parquet")
    written = attribute_rows(items, rows, [(text, "" if text else "invalid") for text in texts])
    write_attributes(path, written, fingerprint=after.fingerprint)
    return StageOutcome(
        {"attributes": "attributes.parquet"}, generated_metrics(read_attributes(path), catalogue, config)
    )


def generated_metrics(store: AttributeStore, catalogue: StagedCatalogue, config: Config) -> dict[str, Any]:
    """`attribute_metrics`, and `quality` over the items that are never trained on, against the truth.

    Raises:
        CatalogueError: there is no column `annotate.ground_truth_column`.
    """
    annotate = config.annotate
    truth, items, splits = (catalogue.column(name) for name in (annotate.ground_truth_column, "item_id", "split"))
    held_out = [row for row in catalogue.rows(annotate.items).tolist() if splits[row] != "train"]
    written = [store.get(items[row]) for row in held_out]
    source = [normalise_attributes(parse_source_attributes(truth[row])) for row in held_out]
    return {**attribute_metrics(store), "quality": quality(written, source)}


def agcl_stage_fn(
    config: Config,
    catalogue: CatalogueRef,
    start: str,
    attributes: str | None,
    name: str,
    directory: str,
) -> StageOutcome:
    metrics = train_agcl(config, AGCLJob(start, attributes, catalogue, directory, name))
    return StageOutcome({"model": "model"}, metrics)


def gallery_stage_fn(
    config: Config, catalogue_ref: CatalogueRef, encoder: EncoderRef, attributes: str, directory: str
) -> StageOutcome:
    """Embed the gallery of the training queries and that of the held-out ones; a row in both is embedded once."""
    catalogue = catalogue_ref.open()
    task = config.rar.task
    sides = {"gallery": task.gallery, "heldout_gallery": task.heldout_gallery}
    rows = {name: catalogue.rows(side) for name, side in sides.items()}
    views = {name: View(side.inputs, side.title_columns, task.gallery_with_attributes) for name, side in sides.items()}
    wanted = {
        view: np.unique(np.concatenate([rows[name] for name in sides if views[name] == view]))
        for view in dict.fromkeys(views.values())
    }
    embedded = embed_rows(wanted, encoder, catalogue_ref, attributes=attributes, pool=config.evaluation.pool)
    for name, view in views.items():
        place = np.searchsorted(wanted[view], rows[name])
        save_embeddings(storage.join(directory, f"{name}.safetensors"), rows[name], embedded[view][place])
    return StageOutcome({name: f"{name}.safetensors" for name in sides}, {name: len(rows[name]) for name in sides})


def rar_job(
    catalogue: CatalogueRef, generator: GeneratorRef, encoder: EncoderRef, gallery: Stage, name: str, directory: str
) -> RARJob:
    """What a RAR starts from."""
    return RARJob(
        generator=generator,
        encoder=encoder,
        catalogue=catalogue,
        gallery=gallery.output("gallery"),
        heldout_gallery=gallery.output("heldout_gallery"),
        gallery_version=gallery.fingerprint,
        directory=directory,
        name=name,
    )


def rar_stage_fn(config: Config, job: RARJob) -> StageOutcome:
    return StageOutcome({"model": "model"}, train_rar(config, job))
