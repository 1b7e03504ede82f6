"""Evaluation stages: embeddings by Ray Data, then the protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.cit.bodies import attribute_metrics
from afmrl_ray.cit.stages import StageOutcome
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import SideConfig
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.retrieval.embed import EncoderRef, View, embed_rows
from afmrl_ray.retrieval.evaluate import evaluate, retrieval_protocol, sides
from afmrl_ray.retrieval.floor import chance, pixel_embeddings
from afmrl_ray.retrieval.ranking import Ranking

EXAMPLES = 24
HITS_SHOWN = 5


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation is done with; `attributes` is the path of a table, or none for unenriched inputs."""

    config: Config
    catalogue: CatalogueRef
    encoder: EncoderRef
    attributes: str | None


def evaluate_body(inputs: EvaluationInputs, directory: str) -> StageOutcome:
    """Run all protocols and write examples of the headline one."""
    config, catalogue = inputs.config, inputs.catalogue.open()
    there = inputs.attributes is not None

    def view(side: SideConfig, enriched: bool) -> View:
        return View(side.inputs, side.title_columns, enriched and there)

    # Every listing once in every way in which any protocol shows it.
    wanted: dict[View, np.ndarray] = {}
    for side, enriched in sides(config.evaluation):
        shown = view(side, enriched)
        wanted[shown] = np.union1d(wanted.get(shown, np.empty(0, np.int64)), catalogue.rows(side))
    embedded = embed_rows(
        wanted, inputs.encoder, inputs.catalogue, attributes=inputs.attributes, pool=config.evaluation.pool
    )

    def embed(side: SideConfig, enriched: bool) -> tuple[np.ndarray, np.ndarray]:
        rows, shown = catalogue.rows(side), view(side, enriched)
        return rows, embedded[shown][np.searchsorted(wanted[shown], rows)]

    protocols, ranking = evaluate(config.evaluation, catalogue, embed, seed=config.run.seed)
    metrics: dict[str, Any] = {"protocols": protocols}
    store = read_attributes(inputs.attributes) if inputs.attributes is not None else None
    if store is not None:
        metrics["attributes"] = attribute_metrics(store)
    texts = store.text if store is not None else lambda item: ""
    storage.write_json(
        storage.join(directory, "examples.json"), examples(ranking, catalogue, texts, seed=config.run.seed)
    )
    return StageOutcome({"examples": "examples.json"}, metrics)


def examples(ranking: Ranking, catalogue: StagedCatalogue, texts: Any, *, seed: int) -> list[dict[str, Any]]:
    """A fixed random choice of queries with what they retrieved."""
    count = min(EXAMPLES, len(ranking.query_rows))
    chosen = np.sort(np.random.default_rng(seed).choice(len(ranking.query_rows), size=count, replace=False))
    found = []
    for index in chosen.tolist():
        item = catalogue.item(int(ranking.query_rows[index]))
        hits = [
            {"row": int(row), "item_id": catalogue.item(int(row)).item_id, "score": float(score), "right": bool(right)}
            for row, score, right in zip(
                ranking.top_rows[index, :HITS_SHOWN],
                ranking.top_scores[index, :HITS_SHOWN],
                ranking.top_right[index, :HITS_SHOWN],
                strict=True,
            )
        ]
        found.append(
            {
                "query_row": item.row,
                "item_id": item.item_id,
                "title": item.title or "",
                "attributes": texts(item.item_id),
                "hits": hits,
            }
        )
    return found


def floor_body(config: Config, catalogue_ref: CatalogueRef, directory: str) -> StageOutcome:
    """8x8 pixels and chance under every retrieval protocol."""
    catalogue = catalogue_ref.open()
    found: dict[str, dict[str, Any]] = {"pixels": {}, "chance": {}}
    embeddings = pixel_embeddings(catalogue)

    def embed(side: SideConfig, enriched: bool) -> tuple[np.ndarray, np.ndarray]:
        rows = catalogue.rows(side)
        return rows, embeddings[rows]

    for protocol in config.evaluation.protocols:
        if isinstance(protocol, RetrievalProtocol):
            found["pixels"][protocol.name], ranking = retrieval_protocol(
                protocol, catalogue, embed, samples=config.evaluation.bootstrap_samples, seed=config.run.seed
            )
            found["chance"][protocol.name] = {"kind": "retrieval", "metrics": chance(protocol, ranking)}
    storage.write_json(storage.join(directory, "floor.json"), found)
    return StageOutcome({"floor": "floor.json"}, found)
