"""BM25 of attribute texts against rank_bm25's own loop: equal numbers first, then both timed in turn."""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
from rank_bm25 import BM25Okapi

from afmrl_ray.attributes.lexical import BM25, tokenize
from afmrl_ray.attributes.text import format_attributes
from afmrl_ray.catalogue.synthetic.products import families

TEXTS, REPEATS, TARGET = 1024, 7, 10.0


def corpus() -> list[str]:
    made = families(TEXTS, 6, np.random.default_rng(0), set())
    texts = [format_attributes(product.attributes().items()) for family in made for product in family]
    random.Random(0).shuffle(texts)
    return texts


def loop(model: BM25Okapi, texts: list[str]) -> np.ndarray:
    return np.stack([model.get_scores(tokenize(text)) for text in texts])


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> int:
    texts = corpus()
    ours, theirs = BM25().fit(texts), BM25Okapi([tokenize(text) for text in texts])
    gap = float(np.abs(ours.scores(texts, texts) - loop(theirs, texts)).max())
    if gap > 1e-4:
        print(f"not equal: {gap:g}", file=sys.stderr)
        return 1
    samples = [
        (seconds(lambda: ours.scores(texts, texts)), seconds(lambda: loop(theirs, texts))) for _ in range(REPEATS)
    ]
    mine, peer = (statistics.median(column) for column in zip(*samples, strict=True))
    record = {
        "name": f"BM25 {TEXTS} x {TEXTS}, tokenising included",
        "ours": mine,
        "peer": peer,
        "ratio": peer / mine,
        "target": TARGET,
        "reached": peer / mine >= TARGET,
        "unit": "seconds; ratio = rank_bm25 loop / ours",
        "samples": samples,
        "largest_difference": gap,
        "versions": {"python": platform.python_version(), "rank-bm25": metadata.version("rank-bm25")},
    }
    path = Path("runs/bench/bm25.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([record], indent=2))
    spread = [f"{min(column) * 1e3:.0f} to {max(column) * 1e3:.0f}" for column in zip(*samples, strict=True)]
    print(f"largest difference {gap:.1e}")
    print(f"ours      {mine * 1e3:8.1f} ms (of {REPEATS}: {spread[0]})")
    print(f"rank_bm25 {peer * 1e3:8.1f} ms (of {REPEATS}: {spread[1]})")
    print(f"ratio     {peer / mine:8.1f} (target {TARGET:g})   -> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
