"""Baselines without a trained model: images shrunk to 8x8 pixels, and chance. A trained encoder must beat both."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.retrieval.ranking import Ranking

SIDE_PX = 8
"""Width and height of the shrunk images."""


def pixels(image: Image.Image) -> np.ndarray:
    """[192] float32: the image as 8x8 RGB pixels."""
    small = image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32).ravel()


def pixel_embeddings(catalogue: StagedCatalogue) -> np.ndarray:
    """[N, 192] pixels of all items minus their mean over the catalogue, scaled to unit length."""
    found = np.stack([pixels(catalogue.image(row)) for row in range(len(catalogue))])
    found -= found.mean(0)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


def chance(protocol: RetrievalProtocol, ranking: Ranking) -> dict[str, Any]:
    """Expected hit@k and recall@k of a random order, from each query's number of positives and candidates."""
    values: dict[str, Any] = {}
    for k in protocol.ks:
        hits = hit_by_chance(ranking.positives, ranking.candidates, k)
        recalls = np.minimum(k, ranking.candidates) / ranking.candidates
        values[f"hit@{k}"] = {"mean": float(np.mean(hits)), "low": None, "high": None}
        values[f"recall@{k}"] = {"mean": float(np.mean(recalls)), "low": None, "high": None}
    return values


def hit_by_chance(positives: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """[Q] probability that k items drawn from `candidates` [Q] include at least one of `positives` [Q]."""
    from scipy import stats

    return 1.0 - stats.hypergeom.pmf(0, candidates, positives, np.minimum(k, candidates))
