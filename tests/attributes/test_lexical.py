"""BM25 equals rank_bm25."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from afmrl_ray.attributes import lexical
from afmrl_ray.attributes.lexical import BM25, tokenize
from afmrl_ray.errors import CatalogueError

_text = st.lists(st.sampled_from(["red", "blue", "v-neck", "color:", "long", "size:", "xl"]), max_size=6).map(" ".join)


def _peer(corpus: list[str], queries: list[str], **constants: float) -> np.ndarray:
    peer = BM25Okapi([tokenize(text) for text in corpus], **constants)
    return np.stack([peer.get_scores(tokenize(query)) for query in queries])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(_text, min_size=1, max_size=8).filter(lambda texts: any(t.strip() for t in texts)),
    st.lists(_text, min_size=1, max_size=4),
)
def test_scores_equal_rank_bm25(corpus: list[str], queries: list[str]) -> None:
    scores = BM25(k1=1.2, b=0.6, epsilon=0.3).fit(corpus).scores(queries, corpus)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, _peer(corpus, queries, k1=1.2, b=0.6, epsilon=0.3), rtol=1e-6, atol=1e-6)


def test_negative_idf_is_replaced_and_repeated_query_words_count_repeatedly() -> None:
    corpus = ["color: red", "color: blue", "color: green", "color: red; style: plain"]
    model = BM25().fit(corpus)
    once, twice = model.scores(["color", "color color"], corpus)
    assert (once > 0).all(), "a word of every document has a negative idf, which is replaced"
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)
    np.testing.assert_allclose(once, _peer(corpus, ["color"])[0], rtol=1e-6)


def test_a_document_outside_the_corpus_uses_the_statistics_of_the_corpus() -> None:
    corpus = ["color: red", "color: blue; style: plain", "neck: round", "sleeve: long"]
    model = BM25().fit(corpus)
    # "unseen" has no idf, so this document scores as one of length 4 with "red" once.
    score = model.scores(["red unseen"], ["red unseen unseen unseen"])[0, 0]
    idf = np.log(4 - 1 + 0.5) - np.log(1 + 0.5)
    average = (2 + 4 + 2 + 2) / 4
    assert score == pytest.approx(idf * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 4 / average)), rel=1e-6)


def test_scores_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"color: c{i % 3}; size: s{i % 7}" for i in range(50)]
    model = BM25().fit(texts)
    whole = model.scores(texts[:9], texts)
    monkeypatch.setattr(lexical, "_CHUNK", 8)
    np.testing.assert_array_equal(model.scores(texts[:9], texts), whole)


def test_empty_texts_score_zero() -> None:
    model = BM25().fit(["color: red", "", "size: xl", "neck: v"])
    scores = model.scores(["", "red", "unknown"], ["", "color: red", "other words"])
    assert scores.shape == (3, 3)
    assert scores[1, 1] > 0
    assert np.count_nonzero(scores) == 1
    assert model.scores([], ["red"]).shape == (0, 1)
    assert model.scores(["red"], []).shape == (1, 0)


@pytest.mark.parametrize("corpus", [[], ["", " ; :"]])
def test_a_corpus_without_words_is_an_error(corpus: list[str]) -> None:
    with pytest.raises(CatalogueError, match="annotate"):
        BM25().fit(corpus)


def test_a_thousand_texts_equal_rank_bm25() -> None:
    draw = np.random.default_rng(0)
    sizes = [60, 400, 24, 30, 40, 12, 8, 25, 4, 3]
    texts = ["; ".join(f"name{i}: v{i}x{draw.integers(size)}" for i, size in enumerate(sizes)) for _ in range(1024)]
    scores = BM25().fit(texts).scores(texts, texts)
    np.testing.assert_allclose(scores[:5], _peer(texts, texts[:5]), rtol=1e-6, atol=1e-6)
