"""BM25 equals rank_bm25; other terms and Lucene's idf equal a loop over terms."""

from __future__ import annotations

import math
from collections import Counter

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


def test_terms_of_an_attribute_text() -> None:
    text = "Color: Dark Red; neck line: V-Neck; size: 10"
    assert tokenize(text) == ["color", "dark", "red", "neck", "line", "v-neck", "size", "10"]
    assert tokenize(text, "values") == ["dark", "red", "v-neck", "10"]
    assert tokenize(text, "pairs") == ["color=dark red", "neck line=v-neck", "size=10"]
    for terms in ("words", "values", "pairs"):
        assert tokenize("", terms) == []


def _terms(text: str, kind: str) -> list[str]:
    pairs = [part.split(": ") for part in text.split("; ") if part]
    if kind == "pairs":
        return ["=".join(pair) for pair in pairs]
    return [word for pair in pairs for word in (pair[1] if kind == "values" else " ".join(pair)).split()]


def _by_loop(corpus: list[str], query: str, document: str, kind: str, formula: str) -> float:
    """Okapi BM25 of one query and one document, term after term, as in Robertson and Zaragoza (2009)."""
    documents = [_terms(text, kind) for text in corpus]
    count, average = len(documents), sum(map(len, documents)) / len(documents)
    found = Counter(_terms(document, kind))
    frequency = {term: sum(term in own for own in documents) for own in documents for term in own}
    robertson = {term: math.log((count - n + 0.5) / (n + 0.5)) for term, n in frequency.items()}
    floor = 0.25 * sum(robertson.values()) / len(robertson)
    total = 0.0
    for term in _terms(query, kind):
        if term not in frequency:
            continue
        n = frequency[term]
        if formula == "lucene":
            idf = math.log(1 + (count - n + 0.5) / (n + 0.5))
        else:
            idf = robertson[term] if robertson[term] >= 0 else floor
        norm = 1.5 * (1 - 0.75 + 0.75 * sum(found.values()) / average)
        total += idf * found[term] * 2.5 / (found[term] + norm)
    return total


_attributes = st.dictionaries(
    st.sampled_from(["color", "neck", "logo"]), st.sampled_from(["red", "blue", "dark red", "v"]), max_size=3
).map(lambda pairs: "; ".join(f"{name}: {value}" for name, value in pairs.items()))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(_attributes, min_size=1, max_size=8).filter(any),
    _attributes,
    st.sampled_from(["words", "values", "pairs"]),
    st.sampled_from(["rank_bm25", "lucene"]),
)
def test_scores_equal_a_loop_over_terms(corpus: list[str], query: str, kind: str, formula: str) -> None:
    model = BM25(terms=kind, idf_formula=formula).fit(corpus)  # type: ignore[arg-type]
    expected = [_by_loop(corpus, query, document, kind, formula) for document in corpus]
    np.testing.assert_allclose(model.scores([query], corpus)[0], expected, rtol=1e-5, atol=1e-5)
    if formula == "lucene":
        assert min(expected) >= 0


def test_pairs_tell_exchanged_values_apart_and_words_do_not() -> None:
    texts = ["color: red; logo: blue", "color: blue; logo: red", "color: green; logo: red", "neck: v"]
    own, exchanged = BM25().fit(texts).scores(texts[:1], texts)[0, :2]
    assert own == pytest.approx(exchanged)
    own, exchanged = BM25(terms="pairs").fit(texts).scores(texts[:1], texts)[0, :2]
    assert own > 1
    assert exchanged == 0
