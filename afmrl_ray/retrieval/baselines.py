"""What costs nothing: images shrunk to 8x8 pixels, and chance. A trained encoder must beat both by far."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.retrieval.ranking import Ranking

SIDE = 8


def pixels(image: Image.Image) -> np.ndarray:
    """[192] float32: the image as 8x8 RGB pixels."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32).ravel()


def pixel_embeddings(catalogue: StagedCatalogue) -> np.ndarray:
    """[N, 192] pixels of all rows without their mean, of unit length; what all images share tells none apart."""
    found = np.stack([pixels(catalogue.image(row)) for row in range(len(catalogue))])
    found -= found.mean(0)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


def chance(protocol: RetrievalProtocol, ranking: Ranking) -> dict[str, Any]:
    """Expected hit@k and recall@k of a random order, from each query's number of positives and candidates."""
    values: dict[str, Any] = {}
    for k in protocol.ks:
        hits = [hit_by_chance(int(p), int(n), k) for p, n in zip(ranking.positives, ranking.candidates, strict=True)]
        recalls = [min(k, int(n)) / int(n) for n in ranking.candidates]
        values[f"hit@{k}"] = {"mean": float(np.mean(hits)), "low": None, "high": None}
        values[f"recall@{k}"] = {"mean": float(np.mean(recalls)), "low": None, "high": None}
    return values


def hit_by_chance(positives: int, candidates: int, k: int) -> float:
    """Chance that k items drawn from `candidates` hold at least one of `positives`."""
    misses = candidates - positives
    if k > misses:
        return 1.0
    return 1.0 - math.exp(
        math.lgamma(misses + 1)
        - math.lgamma(misses - k + 1)
        - math.lgamma(candidates + 1)
        + math.lgamma(candidates - k + 1)
    )
