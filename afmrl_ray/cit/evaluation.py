"""Evaluation stages: embeddings by Ray Data, then the protocols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.cit.examples import examples, failures
from afmrl_ray.cit.promotion import GUARDED, decide
from afmrl_ray.cit.stage_functions import generated_metrics
from afmrl_ray.cit.stages import Stage, StageOutcome
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.retrieval.baselines import chance, pixel_embeddings
from afmrl_ray.retrieval.embed import EncoderRef, View, embed_rows
from afmrl_ray.retrieval.evaluate import ProtocolResult, Value, evaluate, paired_gain, retrieval_protocol, selections


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation is done with; `attributes` is the path of a table, or none for uninputs with attributes."""

    config: Config
    catalogue: CatalogueRef
    encoder: EncoderRef
    attributes: str | None


def evaluate_stage(inputs: EvaluationInputs, directory: str) -> StageOutcome:
    """Run all protocols and write examples of the primary protocol one."""
    config, catalogue = inputs.config, inputs.catalogue.open()
    there = inputs.attributes is not None

    def view(side: ItemSelector, with_attributes: bool) -> View:
        return View(side.inputs, side.title_columns, with_attributes and there)

    # Every item once in every way in which any protocol shows it.
    wanted: dict[View, np.ndarray] = {}
    for side, with_attributes in selections(config.evaluation):
        shown = view(side, with_attributes)
        wanted[shown] = np.union1d(wanted.get(shown, np.empty(0, np.int64)), catalogue.rows(side))
    embedded = embed_rows(
        wanted, inputs.encoder, inputs.catalogue, attributes=inputs.attributes, pool=config.evaluation.pool
    )

    def embed(side: ItemSelector, with_attributes: bool) -> tuple[np.ndarray, np.ndarray]:
        rows, shown = catalogue.rows(side), view(side, with_attributes)
        return rows, embedded[shown][np.searchsorted(wanted[shown], rows)]

    measured = evaluate(config.evaluation, catalogue, embed, seed=config.run.seed)
    metrics: dict[str, Any] = {"protocols": {name: found.record for name, found in measured.items()}}
    store = read_attributes(inputs.attributes) if inputs.attributes is not None else None
    if store is not None:
        metrics["attributes"] = generated_metrics(store, catalogue, config)
    texts = store.text if store is not None else lambda item: ""
    primary_protocol = next(p for p in config.evaluation.protocols if p.name == config.evaluation.primary_protocol)
    ranking = measured[primary_protocol.name].ranking
    assert isinstance(primary_protocol, RetrievalProtocol)  # the config's validator made sure
    assert ranking is not None
    drawn = examples(ranking, catalogue, texts, seed=config.run.seed)
    storage.write_json(storage.join(directory, "examples.json"), drawn)
    worst = failures(ranking, catalogue, texts, primary_protocol, embed)
    storage.write_json(storage.join(directory, "failures.json"), worst)
    write_per_query(storage.join(directory, "per_query.safetensors"), measured)
    outputs = {"examples": "examples.json", "failures": "failures.json", "per_query": "per_query.safetensors"}
    return StageOutcome(outputs, metrics)


def promotion_stage(config: Config, *, last: Stage | None, before: Stage | None, now: Stage) -> StageOutcome:
    """Hold a round's evaluation against those of the last promoted round and of the round before.

    Args:
        last: of the last round that was promoted; none = this is the first.
        before: of the round before; none = this is the first.
        now: of the round.
    """

    def change(since: Stage, protocol: str, metric: str) -> Value:
        numbers = (read_per_query(stage, protocol, metric) for stage in (since, now))
        return paired_gain(*numbers, samples=config.evaluation.bootstrap_samples, seed=config.run.seed)

    kinds = {protocol.name: protocol.kind for protocol in config.evaluation.protocols}
    guarded = config.cit.gate.protocols if last is not None else ()
    changes = {name: change(last, name, GUARDED[kinds[name]]) for name in guarded if last is not None}
    decision = decide(changes, config.cit.gate)
    metrics: dict[str, Any] = {
        "promoted": decision.promoted,
        "why": decision.why,
        "changes": {name: asdict(value) for name, value in changes.items()},
    }
    if before is not None:
        metrics["gain"] = asdict(
            change(before, config.cit.selection_protocol or config.evaluation.primary_protocol, "hit@1")
        )
    return StageOutcome({}, metrics)


def write_per_query(path: str, measured: Mapping[str, ProtocolResult]) -> None:
    """Keep the numbers of every query, so that evaluations can be compared query by query."""
    from safetensors.numpy import save

    columns = {
        f"{name}/{column}": np.ascontiguousarray(values)
        for name, found in measured.items()
        for column, values in {"rows": found.rows.astype(np.int64), **found.per_query}.items()
    }
    storage.write_bytes(path, save(columns))


def read_per_query(stage: Stage, protocol: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Catalogue rows [Q] and numbers [Q] of an evaluation stage."""
    from safetensors.numpy import load

    columns = load(storage.read_bytes(stage.output("per_query")))
    return columns[f"{protocol}/rows"], columns[f"{protocol}/{metric}"]


def baselines_stage(config: Config, catalogue_ref: CatalogueRef, directory: str) -> StageOutcome:
    """8x8 pixels and chance under every retrieval protocol."""
    catalogue = catalogue_ref.open()
    found: dict[str, dict[str, Any]] = {"pixels": {}, "chance": {}}
    embeddings = pixel_embeddings(catalogue)

    def embed(side: ItemSelector, with_attributes: bool) -> tuple[np.ndarray, np.ndarray]:
        rows = catalogue.rows(side)
        return rows, embeddings[rows]

    for protocol in config.evaluation.protocols:
        if isinstance(protocol, RetrievalProtocol):
            pixels = retrieval_protocol(
                protocol, catalogue, embed, samples=config.evaluation.bootstrap_samples, seed=config.run.seed
            )
            assert pixels.ranking is not None
            found["pixels"][protocol.name] = pixels.record
            found["chance"][protocol.name] = {"kind": "retrieval", "metrics": chance(protocol, pixels.ranking)}
    storage.write_json(storage.join(directory, "floor.json"), found)
    return StageOutcome({"floor": "floor.json"}, found)
