"""BM25 of attribute texts against rank_bm25's own loop and, where it is installed, bm25s."""

from __future__ import annotations

import importlib.util
import random
import sys

import numpy as np
from rank_bm25 import BM25Okapi

from afmrl_ray.attributes.lexical import BM25, tokenize
from afmrl_ray.attributes.text import format_attributes
from afmrl_ray.catalogue.synthetic.products import families
from jobs.benchmarks.harness import Comparison, compare, seconds, show, write

TEXTS = 1024


def corpus() -> list[str]:
    """Attribute texts of synthetic products, in random order."""
    made = families(TEXTS, 6, np.random.default_rng(0), set())
    texts = [format_attributes(product.attributes().items()) for family in made for product in family]
    random.Random(0).shuffle(texts)
    return texts


def comparisons() -> list[Comparison]:
    """Time all scores of `TEXTS` texts against one another.

    Raises:
        AssertionError: the scores differ from those of rank_bm25.
    """
    texts = corpus()
    ours, theirs = BM25().fit(texts), BM25Okapi([tokenize(text) for text in texts])

    def loop() -> np.ndarray:
        return np.stack([theirs.get_scores(tokenize(text)) for text in texts])

    gap = float(np.abs(ours.scores(texts, texts) - loop()).max())
    assert gap < 1e-4, f"scores differ from those of rank_bm25: {gap:g}"
    name = f"BM25 {len(texts)} x {len(texts)}, tokenising included"
    equality = f"largest difference from rank_bm25 {gap:.1e}"
    mine = seconds(lambda: ours.scores(texts, texts))
    found = [compare(name, "rank_bm25 loop", mine, seconds(loop), target=10, at_most=False, equality=equality)]
    if importlib.util.find_spec("bm25s"):
        import bm25s

        model = bm25s.BM25()
        model.index([tokenize(text) for text in texts], show_progress=False)

        def scores() -> np.ndarray:
            return np.stack([model.get_scores(tokenize(text)) for text in texts])

        other = "idf differs from Okapi's, so only times are compared"
        found.append(compare(name, "bm25s", mine, seconds(scores), target=1.0, equality=other))
    return found


def main() -> int:
    found = comparisons()
    show(found)
    write("bm25", found, ["rank-bm25", "numpy", "scipy"])
    return 0 if all(c.reached for c in found) else 1


if __name__ == "__main__":
    sys.exit(main())
