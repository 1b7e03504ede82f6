"""Stages that measure: every protocol with an encoder and attributes, and baselines that need no training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.cit.examples import examples, failures
from afmrl_ray.cit.spec import CATALOGUE, StageContext, StageSpec
from afmrl_ray.cit.stages.attributes import generated_metrics
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.retrieval.baselines import chance, pixel_embeddings
from afmrl_ray.retrieval.embed import EncoderRef, View, embed_rows
from afmrl_ray.retrieval.evaluate import evaluate, retrieval_protocol, selections
from afmrl_ray.retrieval.per_query import FILE, write_per_query
from afmrl_ray.runs import StageName, StageOutcome
from afmrl_ray.training.cluster import pool_demand


def declare_evaluate(config: Config, number: int) -> StageSpec:
    name, attributes = StageName("evaluate", number), StageName("attributes", number + 1)
    return evaluation_spec(config, name, encoder=StageName("agcl", number), attributes=attributes)


def declare_evaluate_baseline(config: Config) -> StageSpec:
    return evaluation_spec(config, StageName("evaluate-baseline"), encoder=StageName("baseline"))


def evaluation_spec(
    config: Config,
    name: StageName,
    *,
    encoder: StageName,
    attributes: StageName | None = None,
    changes: Mapping[str, Any] | None = None,
) -> StageSpec:
    """An evaluation by all protocols.

    Args:
        encoder: stage with the encoder.
        attributes: stage with the attribute table that protocols with attributes use; none = none of them does.
        changes: values over the run's config.
    """
    return StageSpec(
        name,
        evaluate_stage,
        reads=("run", "encoder", "evaluation", "annotate.items", "annotate.ground_truth_column"),
        upstream={
            "catalogue": CATALOGUE,
            "encoder": encoder,
            **({"attributes": attributes} if attributes is not None else {}),
        },
        resources=(pool_demand(config.evaluation.pool),),
        changes=changes or {},
    )


def evaluate_stage(context: StageContext) -> StageOutcome:
    """Measures an encoder by all protocols and writes examples and failures of the primary one."""
    config, catalogue = context.config, context.catalogue.open()
    table = context.output("attributes", "attributes") if "attributes" in context.upstream else None

    def view(selector: ItemSelector, with_attributes: bool) -> View:
        return View(selector.inputs, selector.title_columns, with_attributes and table is not None)

    # Every item is embedded once in every view that any protocol uses.
    wanted: dict[View, np.ndarray] = {}
    for selector, with_attributes in selections(config.evaluation):
        shown = view(selector, with_attributes)
        wanted[shown] = np.union1d(wanted.get(shown, np.empty(0, np.int64)), catalogue.rows(selector))
    encoder = EncoderRef(context.output("encoder", "model"), config.encoder)
    embedded = embed_rows(wanted, encoder, context.catalogue, attributes=table, pool=config.evaluation.pool)

    def embed(selector: ItemSelector, with_attributes: bool) -> tuple[np.ndarray, np.ndarray]:
        rows, shown = catalogue.rows(selector), view(selector, with_attributes)
        return rows, embedded[shown][np.searchsorted(wanted[shown], rows)]

    measured = evaluate(config.evaluation, catalogue, embed, seed=config.run.seed)
    metrics: dict[str, Any] = {"protocols": {name: found.record for name, found in measured.items()}}
    store = read_attributes(table) if table is not None else None
    if store is not None:
        metrics["attributes"] = generated_metrics(store, catalogue, config)
    texts = store.text if store is not None else lambda item: ""
    primary = next(p for p in config.evaluation.protocols if p.name == config.evaluation.primary_protocol)
    ranking = measured[primary.name].ranking
    assert isinstance(primary, RetrievalProtocol)  # the config's validator made sure
    assert ranking is not None
    drawn = examples(ranking, catalogue, texts, seed=config.run.seed)
    storage.write_json(context.path("examples.json"), drawn)
    worst = failures(ranking, catalogue, texts, primary, embed)
    storage.write_json(context.path("failures.json"), worst)
    write_per_query(context.path(FILE), measured)
    return StageOutcome({"examples": "examples.json", "failures": "failures.json", "per_query": FILE}, metrics)


def declare_baselines(config: Config) -> StageSpec:
    return StageSpec(
        StageName("baselines"), baselines_stage, reads=("run", "evaluation"), upstream={"catalogue": CATALOGUE}
    )


def baselines_stage(context: StageContext) -> StageOutcome:
    """Measures 8x8 pixel embeddings and chance by every retrieval protocol."""
    config, catalogue = context.config, context.catalogue.open()
    found: dict[str, dict[str, Any]] = {"pixels": {}, "chance": {}}
    embeddings = pixel_embeddings(catalogue)

    def embed(selector: ItemSelector, with_attributes: bool) -> tuple[np.ndarray, np.ndarray]:
        rows = catalogue.rows(selector)
        return rows, embeddings[rows]

    for protocol in config.evaluation.protocols:
        if isinstance(protocol, RetrievalProtocol):
            pixels = retrieval_protocol(
                protocol, catalogue, embed, samples=config.evaluation.bootstrap_samples, seed=config.run.seed
            )
            assert pixels.ranking is not None
            found["pixels"][protocol.name] = pixels.record
            found["chance"][protocol.name] = {"kind": "retrieval", "metrics": chance(protocol, pixels.ranking)}
    storage.write_json(context.path("baselines.json"), found)
    return StageOutcome({"baselines": "baselines.json"}, found)
