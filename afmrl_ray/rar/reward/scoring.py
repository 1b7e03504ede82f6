"""Encoding of queries with attributes and ranking of the gallery: the plain code inside a reward actor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch

from afmrl_ray.config.rar import RewardConfig
from afmrl_ray.errors import CatalogueError
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.prefix_groups import group_tokens
from afmrl_ray.rar.reward.spec import METRICS, Query, RewardSpec
from afmrl_ray.retrieval import metrics
from afmrl_ray.retrieval.embed import Encoder
from afmrl_ray.retrieval.evaluate import label_codes
from afmrl_ray.retrieval.shards import (
    Comparison,
    GalleryShard,
    Positives,
    merged,
    positive_log_probabilities,
    ranking_of,
)


@dataclass(frozen=True)
class PreparedQueries:
    """Tokenised queries of one request.

    Attributes:
        gallery: name of the gallery that they search.
        inputs: model input by query.
        tokens: cost of encoding them, tokens.
    """

    gallery: str
    inputs: dict[Query, ModelInput]
    tokens: int


@dataclass(frozen=True)
class EncodedQueries:
    """Embeddings of queries that search the same gallery.

    Attributes:
        gallery: name of the gallery.
        queries: Q distinct queries.
        embeddings: [Q, D] float32.
    """

    gallery: str
    queries: list[Query]
    embeddings: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """[Q] catalogue rows."""
        return np.array([row for row, _ in self.queries])


class Scorer:
    """The frozen encoder and one part of every gallery.

    Args:
        spec: encoder and galleries.
        config: `rar.reward`.
        part: index of the galleries' part that is searched here.
        threads: number of torch threads.
    """

    def __init__(self, spec: RewardSpec, config: RewardConfig, *, part: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._spec, self._config = spec, config
        self._encoder = Encoder(spec.encoder, spec.catalogue)
        if config.shared_prefix:
            self._encoder.share_prefixes()
        self._labels = np.array(label_codes(spec.catalogue.open().column("product_id")))
        self._shards: dict[str, GalleryShard] = {}
        self._has_positive: dict[str, np.ndarray] = {}
        for name, gallery in spec.galleries.items():
            rows = ray.get(gallery.rows[0])
            places = np.array_split(np.arange(len(rows)), len(gallery.parts))[part]
            own = rows[places]
            self._shards[name] = GalleryShard(
                ray.get(gallery.parts[part]), own, self._labels[own], places, spec.left_out.get(name)
            )
            self._has_positive[name] = _has_positive(self._labels, rows)

    def check(self, gallery: str, queries: Sequence[Query]) -> None:
        """Make sure that every query has a positive in the gallery.

        Raises:
            CatalogueError: one has none.
        """
        without = sorted({row for row, _ in queries if not self._has_positive[gallery][row]})
        if without:
            raise CatalogueError(
                f"{len(without)} queries (catalogue rows {without[:5]}) have no positive in gallery {gallery!r}; "
                "leave them out, or widen rar.task.gallery"
            )

    def prepare(self, gallery: str, queries: Sequence[Query]) -> PreparedQueries:
        """Read the images of queries and tokenise."""
        selector = self._spec.queries[gallery]
        inputs: dict[Query, ModelInput] = {}
        tokens = 0
        for row, texts in _by_item(queries).items():
            built = self._encoder.item_rows(row, texts, inputs=selector.inputs, title_columns=selector.title_columns)
            inputs.update(zip(((row, text) for text in texts), built, strict=True))
            tokens += group_tokens(built) if self._config.shared_prefix else sum(map(len, built))
        return PreparedQueries(gallery, inputs, tokens)

    def encode(self, batch: Sequence[PreparedQueries]) -> list[EncodedQueries]:
        """Embed the queries of a batch of requests; those of an item share its prefix, also across requests."""
        encoded = []
        for gallery in dict.fromkeys(each.gallery for each in batch):
            inputs = {query: one for each in batch if each.gallery == gallery for query, one in each.inputs.items()}
            grouped = _by_item(list(inputs))
            queries = [(row, text) for row, texts in grouped.items() for text in texts]
            if self._config.shared_prefix:
                groups = [[inputs[row, text] for text in texts] for row, texts in grouped.items()]
                embeddings = self._encoder.embed_groups(groups, tokens=self._config.tokens_per_batch)
            else:
                separate = [inputs[query] for query in queries]
                embeddings = self._encoder.embed_each(separate, tokens=self._config.tokens_per_batch)
            encoded.append(EncodedQueries(gallery, queries, embeddings))
        return encoded

    def positives(self, gallery: str, rows: np.ndarray, embeddings: np.ndarray) -> Positives:
        """Similarities of the queries' positives in this part; `rows` [Q], `embeddings` [Q, D]."""
        return self._shards[gallery].positives(embeddings, rows, self._labels[rows])

    def compare(self, gallery: str, rows: np.ndarray, embeddings: np.ndarray, positives: Positives) -> Comparison:
        """How the items of this part compare with the positives of all parts."""
        return self._shards[gallery].compare(embeddings, rows, positives, temperature=self._config.temperature)

    def metrics(self, rows: np.ndarray, positives: Positives, comparisons: Sequence[Comparison]) -> np.ndarray:
        """[Q, len(METRICS)] of queries that passed `check`, from the comparisons of all parts."""
        ranking, k = ranking_of(rows, positives, comparisons), self._config.k
        values = {
            "hit_1": metrics.hit_at_k(ranking, 1),
            "hit": metrics.hit_at_k(ranking, k),
            "recall": metrics.recall_at_k(ranking, k),
            "reciprocal_rank": metrics.reciprocal_rank(ranking),
            "ndcg": metrics.ndcg_at_k(ranking, k),
            "log_softmax": positive_log_probabilities(positives, comparisons, temperature=self._config.temperature),
        }
        return np.stack([values[name] for name in METRICS], axis=1)

    def rank(self, encoded: EncodedQueries) -> np.ndarray:
        """[Q, len(METRICS)] when this part is the whole gallery."""
        arguments = encoded.gallery, encoded.rows, encoded.embeddings
        positives = merged([self.positives(*arguments)])
        return self.metrics(encoded.rows, positives, [self.compare(*arguments, positives)])

    def score(self, gallery: str, queries: Sequence[Query]) -> np.ndarray:
        """[Q, len(METRICS)] when this part is the whole gallery: all phases of a request in one call."""
        self.check(gallery, queries)
        (encoded,) = self.encode([self.prepare(gallery, queries)])
        found = dict(zip(encoded.queries, self.rank(encoded), strict=True))
        return np.stack([found[query] for query in queries])


def _by_item(queries: Sequence[Query]) -> dict[int, list[str]]:
    """Distinct attribute texts by catalogue row."""
    grouped: dict[int, dict[str, None]] = {}
    for row, text in queries:
        grouped.setdefault(row, {})[text] = None
    return {row: list(texts) for row, texts in grouped.items()}


def _has_positive(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[catalogue rows] bool: whether a row has a positive other than itself among the gallery rows [N]."""
    known = labels >= 0
    counts = np.bincount(labels[rows][known[rows]], minlength=int(labels.max(initial=-1)) + 1)
    inside = np.zeros(len(labels), dtype=np.int64)
    inside[rows] = 1
    found = np.zeros(len(labels), dtype=bool)
    found[known] = counts[labels[known]] - inside[known] > 0
    return found
