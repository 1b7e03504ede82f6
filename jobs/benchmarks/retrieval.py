"""Exact retrieval evaluation: ranks of every positive and the best 50, against a bare search and an evaluator."""

from __future__ import annotations

import importlib.util

import numpy as np

from afmrl_ray.retrieval.metrics import hit_at_k, reciprocal_rank
from afmrl_ray.retrieval.ranking import Ranking, rank_gallery
from jobs.benchmarks.harness import Comparison, compare, seconds

QUERIES, ITEMS, DIMENSION, DEPTH, PRODUCTS = 1_000, 100_000, 1536, 50, 10_000


def comparisons() -> list[Comparison]:
    """Time ranks and the best `DEPTH` of random embeddings.

    Raises:
        AssertionError: the best items or the metrics differ from those of the other implementation.
    """
    draw = np.random.default_rng(0)
    labels = draw.integers(PRODUCTS, size=ITEMS)
    asked = draw.integers(PRODUCTS, size=QUERIES)
    centres = draw.standard_normal((PRODUCTS, DIMENSION), dtype=np.float32)

    def near(which: np.ndarray) -> np.ndarray:
        found = centres[which] + 4 * draw.standard_normal((len(which), DIMENSION), dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    gallery, queries = near(labels), near(asked)
    rows = np.arange(ITEMS)

    def ours() -> Ranking:
        return rank_gallery(
            queries,
            gallery,
            query_rows=np.arange(ITEMS, ITEMS + QUERIES),
            gallery_rows=rows,
            query_labels=asked,
            gallery_labels=labels,
            gallery_order=rows,
            depth=DEPTH,
        )

    ranking = ours()
    name = f"evaluation, {QUERIES} queries, {ITEMS} items, D {DIMENSION}, k {DEPTH}"
    found = []
    if importlib.util.find_spec("faiss"):
        import faiss

        def search() -> np.ndarray:
            index = faiss.IndexFlatIP(DIMENSION)
            index.add(gallery)
            return index.search(queries, DEPTH)[1]

        kept = np.isin(np.arange(QUERIES), ranking.query_rows - ITEMS)
        same = float((search()[kept] == ranking.top_rows).mean())
        assert same > 0.999, f"only {same:.4f} of the best items are those of faiss"
        found.append(
            compare(
                name,
                "faiss IndexFlatIP, search only",
                seconds(ours),
                seconds(search),
                target=1.25,
                equality=f"{100 * same:.3f} % of the best {DEPTH} equal (the rest: ties within rounding)",
                repeats=5,
            )
        )
    if importlib.util.find_spec("sentence_transformers"):
        found.append(_against_evaluator(name, ours, ranking, queries, gallery, asked, labels))
    return found


def _against_evaluator(name, ours, ranking, queries, gallery, asked, labels) -> Comparison:
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    members: dict[int, set[str]] = {}
    for row, label in enumerate(labels.tolist()):
        members.setdefault(label, set()).add(f"d{row}")
    evaluator = InformationRetrievalEvaluator(
        queries={f"q{i}": f"q{i}" for i in range(QUERIES)},
        corpus={f"d{i}": f"d{i}" for i in range(ITEMS)},
        relevant_docs={f"q{i}": members.get(int(label), set()) for i, label in enumerate(asked)},
        mrr_at_k=[DEPTH],
        ndcg_at_k=[DEPTH],
        accuracy_at_k=[1, 5, DEPTH],
        precision_recall_at_k=[DEPTH],
        map_at_k=[DEPTH],
        show_progress_bar=False,
        write_csv=False,
    )

    class Ready:
        """A model with precomputed embeddings."""

        similarity_fn_name = "dot"

        @staticmethod
        def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b.T

    def embed(model: object, texts: list[str], **_: object) -> torch.Tensor:
        source = queries if texts[0].startswith("q") else gallery
        return torch.from_numpy(source[[int(text[1:]) for text in texts]])

    evaluator.embed_inputs = embed
    evaluator.score_functions = {"dot": Ready.similarity}
    evaluator.score_function_names = ["dot"]

    def evaluate() -> dict[str, dict[str, dict[int, float]]]:
        return evaluator.compute_metrices(Ready())

    theirs = evaluate()["dot"]
    answered = len(ranking.query_rows) / len(evaluator.queries)
    gap = abs(float(hit_at_k(ranking, 5).mean()) * answered - theirs["accuracy@k"][5])
    best = np.where(reciprocal_rank(ranking) >= 1 / DEPTH, reciprocal_rank(ranking), 0).mean() * answered
    gap = max(gap, abs(float(best) - theirs["mrr@k"][DEPTH]))
    assert gap < 2e-3, f"metrics differ by {gap:g}"
    return compare(
        name,
        "sentence-transformers evaluator",
        seconds(ours),
        seconds(evaluate),
        target=1.0,
        equality=f"hit@5 and MRR@{DEPTH} equal within {gap:.0e}",
        repeats=5,
    )
