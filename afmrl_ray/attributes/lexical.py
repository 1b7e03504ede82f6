"""BM25 between attribute texts: all queries against all documents by one sparse product.

Scores are those of `rank_bm25.BM25Okapi`, whose Robertson idf is negative for terms of most documents and is then
replaced by epsilon times the mean idf; or, with the same formula otherwise, use Lucene's idf, which is never negative.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from rank_bm25 import BM25Okapi
from scipy import sparse

from afmrl_ray.attributes.text import SEPARATOR
from afmrl_ray.errors import CatalogueError

_CHUNK = 1024
_SEPARATORS = str.maketrans(";:", "  ")


Terms = Literal["words", "values", "pairs"]
IdfFormula = Literal["rank_bm25", "lucene"]


def tokenize(text: str, terms: Terms = "words") -> list[str]:
    """The terms of an attribute text, lower-cased.

    Args:
        text: `name: value; name: value`.
        terms: `words` = words of names and values, split at `;`, `:` and white space; `values` = words of values only;
            `pairs` = one term `name=value` for each pair.
    """
    if terms == "words":
        return text.translate(_SEPARATORS).lower().split()
    pairs = [segment.partition(":") for segment in text.lower().split(SEPARATOR)]
    if terms == "values":
        return [word for _, _, value in pairs for word in value.split()]
    return [f"{name.strip()}={value.strip()}" for name, _, value in pairs if value.strip()]


class BM25:
    """Okapi BM25; with the default idf, scores equal those of `rank_bm25.BM25Okapi`.

    Args:
        k1: saturation of term frequency.
        b: strength of length normalisation.
        epsilon: for idf `rank_bm25`: a negative idf becomes `epsilon` times the mean idf.
        terms: what is counted, see `tokenize`.
        idf_formula: `rank_bm25` = log((N - n + 0.5) / (n + 0.5)) for a term of n of N documents; `lucene` =
            log(1 + (N - n + 0.5) / (n + 0.5)).
    """

    def __init__(
        self,
        k1: float = 1.5,
        b: float = 0.75,
        epsilon: float = 0.25,
        *,
        terms: Terms = "words",
        idf_formula: IdfFormula = "rank_bm25",
    ) -> None:
        self.k1, self.b, self.epsilon = k1, b, epsilon
        self._terms, self._idf_formula = terms, idf_formula
        self._columns: dict[str, int] = {}
        self._idf = np.zeros(0)
        self._average_length = 0.0

    def fit(self, corpus: Sequence[str]) -> BM25:
        """Compute document frequencies and the mean length of `corpus`; returns self.

        Raises:
            CatalogueError: no text of the corpus contains a term.
        """
        documents = [tokenize(text, self._terms) for text in corpus]
        if not any(documents):
            raise CatalogueError(
                f"BM25: none of the {len(documents)} attribute texts contains a word; annotate these items, or train "
                "the generator longer if all its output is invalid (reasons: attributes-r*/stage.json), or set "
                "agcl.lexical.enabled=false"
            )
        idf = self._lucene_idf(documents) if self._idf_formula == "lucene" else self._okapi_idf(documents)
        self._columns = {term: column for column, term in enumerate(idf)}
        self._idf = np.fromiter(idf.values(), dtype=np.float64, count=len(self._columns))
        self._average_length = sum(map(len, documents)) / len(documents)
        return self

    def _okapi_idf(self, documents: list[list[str]]) -> dict[str, float]:
        statistics = BM25Okapi(documents, k1=self.k1, b=self.b, epsilon=self.epsilon)
        return dict(statistics.idf)

    def _lucene_idf(self, documents: list[list[str]]) -> dict[str, float]:
        frequency = Counter(term for document in documents for term in dict.fromkeys(document))
        return {term: math.log1p((len(documents) - n + 0.5) / (n + 0.5)) for term, n in frequency.items()}

    def scores(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """BM25 scores of every document for every query.

        A term that occurs several times in a query counts as often. Terms outside the corpus score 0, but count in the
        length of a document. Documents outside the corpus are scored with the statistics of the corpus.

        Args:
            queries: Q texts.
            documents: N texts.

        Returns:
            [Q, N] float32.

        Raises:
            RuntimeError: called before `fit`.
        """
        if not self._columns:
            raise RuntimeError("BM25.scores before BM25.fit")
        in_queries, _ = self._counts(queries)
        in_documents, lengths = self._counts(documents)
        saturation = self.k1 * (1 - self.b + self.b * lengths / self._average_length)
        frequency = in_documents.data
        length_norm = np.repeat(saturation, np.diff(in_documents.indptr))
        in_documents.data = frequency * (self.k1 + 1) / (frequency + length_norm)
        in_queries.data *= self._idf[in_queries.indices]
        # Attribute names occur in nearly every text, so the result is dense. A dense right operand, restricted to the
        # words of the queries, is several times faster than a sparse one; chunks bound its memory.
        words = np.unique(in_queries.indices)
        in_queries, in_documents = in_queries[:, words], in_documents[:, words]
        scores = np.empty((len(queries), len(documents)), dtype=np.float32)
        for start in range(0, len(documents), _CHUNK):
            scores[:, start : start + _CHUNK] = in_queries @ in_documents[start : start + _CHUNK].T.toarray()
        return scores

    def _counts(self, texts: Sequence[str]) -> tuple[sparse.csr_array, np.ndarray]:
        """Counts [B, V] of the terms of the corpus in B texts, and lengths [B] in terms, unknown ones included."""
        tokens = [tokenize(text, self._terms) for text in texts]
        known = [[column for word in words if (column := self._columns.get(word)) is not None] for words in tokens]
        indptr = np.concatenate([[0], np.cumsum([len(columns) for columns in known], dtype=np.int64)])
        indices = np.fromiter((column for columns in known for column in columns), dtype=np.int64, count=indptr[-1])
        shape = (len(texts), len(self._columns))
        counts = sparse.csr_array((np.ones(len(indices)), indices, indptr), shape=shape)
        counts.sum_duplicates()
        return counts, np.array([len(words) for words in tokens], dtype=np.float64)
