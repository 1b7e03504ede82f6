"""Stages that train a model, and the gallery embeddings that the reward searches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from afmrl_ray.agcl.mined_negatives import mine_negatives, write_negatives
from afmrl_ray.agcl.train import AGCLJob, train_agcl
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.catalogue.values import parse_source_attributes
from afmrl_ray.cit.spec import CATALOGUE, MODELS, StageContext, StageSpec
from afmrl_ray.cit.stages.attributes import generator_before
from afmrl_ray.cit.stages.data import missing_checkpoints
from afmrl_ray.config import Config
from afmrl_ray.distill.train import DistillJob, train_distill
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.models.model_settings import encoder_settings, generator_settings
from afmrl_ray.models.packaged import resolve_checkpoint
from afmrl_ray.rar.trainer import RARJob, train_rar
from afmrl_ray.retrieval.embed import EncoderRef, View, embed_rows, load_embeddings, save_embeddings
from afmrl_ray.retrieval.evaluate import label_codes
from afmrl_ray.runs import Stage, StageName, StageOutcome
from afmrl_ray.storage import absolute, is_dir
from afmrl_ray.training.cluster import Demand, pool_demand, workers_demand

PLAIN_INFONCE: dict[str, Any] = {
    "agcl.lexical": {"enabled": False},
    "agcl.mask": {"enabled": False},
    "agcl.attribute_dropout.query": 1.0,
    "agcl.attribute_dropout.positive": 1.0,
}
"""Settings of a training without attributes, weights and mask; whole sections, since their other fields then have no
effect."""


def models_upstream(config: Config) -> dict[str, StageName]:
    """The stage of the tiny checkpoints, as an upstream role, where the config names no checkpoint."""
    return {"models": MODELS} if missing_checkpoints(config) else {}


def base_checkpoint(path: str | None, models: Stage | None, role: str) -> str:
    """Checkpoint that a model begins with: `<role>.path`, or the one that the stage `models` made."""
    if path is None:
        assert models is not None, f"there is neither a path of the {role} nor a stage that made it"
        return models.output(role)
    path = resolve_checkpoint(path)
    # A folder's name is written into adapters, which are read from any working directory; hub names stay as they are.
    return absolute(path) if is_dir(path) else path


def _base(context: StageContext, role: str) -> str:
    return base_checkpoint(getattr(context.config, role).path, context.upstream.get("models"), role)


def _trained(context: StageContext, role: str, metrics: dict[str, Any]) -> StageOutcome:
    """Write the settings that a model was trained with beside its weights, in `model/`."""
    catalogue, upstream = context.catalogue.fingerprint, context.upstream_fingerprints
    settings = (
        encoder_settings(context.config.encoder, catalogue=catalogue, upstream=upstream)
        if role == "encoder"
        else generator_settings(context.config.generator, catalogue=catalogue, upstream=upstream)
    )
    settings.write(context.path("model"))
    return StageOutcome({"model": "model"}, metrics)


def declare_distill(config: Config) -> StageSpec:
    return generator_spec(config, StageName("distill"), labels=StageName("labels"))


def generator_spec(
    config: Config,
    name: StageName,
    *,
    labels: StageName,
    previous: StageName | None = None,
    changes: Mapping[str, Any] | None = None,
) -> StageSpec:
    """A supervised fine-tuning of the generator.

    Args:
        labels: stage with the attribute table to learn from.
        previous: stage whose generator to continue from; none = the base checkpoint.
        changes: values over the run's config.
    """
    return StageSpec(
        name,
        distill_stage,
        reads=("run", "ray", "generator", "distill"),
        upstream={
            "catalogue": CATALOGUE,
            "labels": labels,
            **models_upstream(config),
            **({"previous": previous} if previous is not None else {}),
        },
        resources=(workers_demand(config.distill.workers),),
        changes=changes or {},
        resumable=True,
    )


def distill_stage(context: StageContext) -> StageOutcome:
    """Fine-tunes the generator on the teacher's attributes."""
    start = context.output("previous", "model") if "previous" in context.upstream else _base(context, "generator")
    job = DistillJob(start, context.output("labels", "attributes"), context.catalogue, context.directory, context.name)
    return _trained(context, "generator", train_distill(context.config, job))


def declare_agcl(config: Config, number: int) -> StageSpec:
    previous = StageName("agcl", number - 1) if number and config.cit.init_from == "previous" else None
    changes = {}
    if number and config.cit.train_fraction is not None:
        changes["agcl.train_fraction"] = config.cit.train_fraction
    name, attributes = StageName("agcl", number), StageName("attributes", number)
    negatives = StageName("negatives", number) if number and config.agcl.mined_negatives.enabled else None
    return encoder_spec(config, name, attributes=attributes, previous=previous, negatives=negatives, changes=changes)


def declare_negatives(config: Config, number: int) -> StageSpec:
    return StageSpec(
        StageName("negatives", number),
        negatives_stage,
        reads=("agcl.mined_negatives",),
        upstream={"catalogue": CATALOGUE, "gallery": StageName("gallery", max(0, number - 1))},
    )


def negatives_stage(context: StageContext) -> StageOutcome:
    """Mines hard negatives of the items in the gallery of the round before."""
    catalogue, settings = context.catalogue.open(), context.config.agcl.mined_negatives
    rows, embeddings = load_embeddings(context.output("gallery", "gallery"))
    codes = np.array(label_codes(catalogue.column("product_id")))[rows]
    items = catalogue.column("item_id")
    found = mine_negatives(
        embeddings,
        embeddings,
        query_rows=rows,
        gallery_rows=rows,
        query_labels=codes,
        gallery_labels=codes,
        gallery_order=np.argsort(np.argsort(np.array([items[row] for row in rows.tolist()], dtype=object))),
        count=settings.count,
        margin=settings.margin,
    )
    write_negatives(context.path("negatives.parquet"), items, rows, found)
    kept = (found >= 0).sum(1)
    return StageOutcome(
        {"negatives": "negatives.parquet"},
        {"items": len(rows), "items_with_negatives": int((kept > 0).sum()), "mean_negatives": float(kept.mean())},
    )


def declare_baseline(config: Config) -> StageSpec:
    changes = dict(PLAIN_INFONCE)
    if config.agcl.batch_grouping.by == "attributes":
        changes["agcl.batch_grouping"] = {"fraction": 0.0}
    return encoder_spec(config, StageName("baseline"), changes=changes)


def encoder_spec(
    config: Config,
    name: StageName,
    *,
    attributes: StageName | None = None,
    previous: StageName | None = None,
    negatives: StageName | None = None,
    changes: Mapping[str, Any] | None = None,
) -> StageSpec:
    """A training of the encoder.

    Args:
        attributes: stage with the attribute table to train with; none = without attributes.
        previous: stage whose encoder to continue from; none = the base checkpoint.
        negatives: stage with mined negatives; none = those of the catalogue.
        changes: values over the run's config.
    """
    optional = {"attributes": attributes, "previous": previous, "negatives": negatives}
    if config.agcl.mined_negatives.enabled and negatives is None:
        # There is no round before whose gallery could be mined.
        changes = {**(changes or {}), "agcl.hard_negatives": 0, "agcl.mined_negatives": {"enabled": False}}
    return StageSpec(
        name,
        agcl_stage,
        reads=("run", "ray", "encoder", "agcl"),
        upstream={
            "catalogue": CATALOGUE,
            **models_upstream(config),
            **{role: stage for role, stage in optional.items() if stage is not None},
        },
        resources=(workers_demand(config.agcl.workers),),
        changes=changes or {},
        resumable=True,
    )


def agcl_stage(context: StageContext) -> StageOutcome:
    """Trains the encoder by contrastive learning, guided by attributes where the stage has some."""
    upstream = context.upstream
    start = context.output("previous", "model") if "previous" in upstream else _base(context, "encoder")
    attributes = context.output("attributes", "attributes") if "attributes" in upstream else None
    negatives = context.output("negatives", "negatives") if "negatives" in upstream else None
    job = AGCLJob(start, attributes, context.catalogue, context.directory, context.name, negatives)
    return _trained(context, "encoder", train_agcl(context.config, job))


def declare_gallery(config: Config, number: int) -> StageSpec:
    return StageSpec(
        StageName("gallery", number),
        gallery_stage,
        reads=("encoder", "rar.task", "evaluation.pool"),
        upstream={
            "catalogue": CATALOGUE,
            "encoder": StageName("agcl", number),
            "attributes": StageName("attributes", number),
        },
        resources=(pool_demand(config.evaluation.pool),),
    )


def gallery_stage(context: StageContext) -> StageOutcome:
    """Embeds the galleries of the training queries and of the held-out ones; an item in both is embedded once."""
    config, catalogue = context.config, context.catalogue.open()
    task = config.rar.task
    selectors = {"gallery": task.gallery, "heldout_gallery": task.heldout_gallery}
    rows = {name: catalogue.rows(selector) for name, selector in selectors.items()}
    views = {
        name: View(selector.inputs, selector.title_columns, task.gallery_with_attributes)
        for name, selector in selectors.items()
    }
    wanted = {
        view: np.unique(np.concatenate([rows[name] for name in selectors if views[name] == view]))
        for view in dict.fromkeys(views.values())
    }
    encoder = EncoderRef(context.output("encoder", "model"), config.encoder)
    attributes = context.output("attributes", "attributes")
    embedded = embed_rows(wanted, encoder, context.catalogue, attributes=attributes, pool=config.evaluation.pool)
    for name, view in views.items():
        positions = np.searchsorted(wanted[view], rows[name])
        save_embeddings(context.path(f"{name}.safetensors"), rows[name], embedded[view][positions])
    return StageOutcome(
        {name: f"{name}.safetensors" for name in selectors}, {name: len(rows[name]) for name in selectors}
    )


def declare_rar(config: Config, number: int) -> StageSpec:
    rar = config.rar
    learners = Demand(rar.num_learners, {"CPU": rar.cpus_per_learner, "GPU": rar.gpus_per_learner})
    return StageSpec(
        StageName("rar", number),
        rar_stage,
        reads=("run", "encoder", "generator", "rar", "annotate.ground_truth_column"),
        upstream={
            "catalogue": CATALOGUE,
            "generator": generator_before(number),
            "encoder": StageName("agcl", number),
            "gallery": StageName("gallery", number),
        },
        resources=(
            pool_demand(rar.rollout.pool), pool_demand(rar.reward.pool), *([learners] if rar.num_learners else [])
        ),
        resumable=True,
    )  # fmt: skip


def rar_stage(context: StageContext) -> StageOutcome:
    """Trains the generator by GRPO, rewarded with the retrieval of the round's frozen encoder."""
    return _trained(context, "generator", train_rar(context.config, rar_job(context)))


def rar_job(context: StageContext) -> RARJob:
    """What a RAR starts from."""
    gallery = context.upstream["gallery"]
    return RARJob(
        generator=GeneratorRef(context.output("generator", "model"), context.config.generator),
        encoder=EncoderRef(context.output("encoder", "model"), context.config.encoder),
        catalogue=context.catalogue,
        gallery=gallery.output("gallery"),
        heldout_gallery=gallery.output("heldout_gallery"),
        gallery_version=gallery.fingerprint,
        directory=context.directory,
        name=context.name,
        heldout_truth=_heldout_truth(context),
    )


def _heldout_truth(context: StageContext) -> dict[int, str]:
    """True attribute texts of the held-out queries that have some, by catalogue row."""
    catalogue = context.catalogue.open()
    truth = catalogue.column(context.config.annotate.ground_truth_column)
    pairs = {
        row: normalise_attributes(parse_source_attributes(truth[row]))
        for row in catalogue.rows(context.config.rar.task.heldout_query).tolist()
    }
    return {row: format_attributes(found) for row, found in pairs.items() if found}
