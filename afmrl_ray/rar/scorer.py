"""Encoding queries with attributes and measuring their retrieval: the plain code inside a reward actor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch

from afmrl_ray.config.train import RewardConfig
from afmrl_ray.errors import CatalogueError
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.prefix_groups import group_tokens
from afmrl_ray.rar.reward_spec import KINDS, Query, RewardSpec
from afmrl_ray.retrieval import metrics
from afmrl_ray.retrieval.embed import Encoder
from afmrl_ray.retrieval.evaluate import label_codes
from afmrl_ray.retrieval.shards import GalleryShard, Positives, merged, ranking_of


@dataclass(frozen=True)
class PreparedQueries:
    """Queries of one request, ready for the encoder.

    Attributes:
        gallery: name of the gallery that they search.
        rows: what the encoder is shown, by query.
        tokens: what they cost.
    """

    gallery: str
    rows: dict[Query, ModelInput]
    tokens: int


@dataclass(frozen=True)
class EncodedQueries:
    """Queries that search the same gallery, after the encoder.

    Attributes:
        gallery: its name.
        queries: Q queries, each once.
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
    """The frozen encoder and this actor's part of every gallery.

    Args:
        spec: encoder and galleries.
        config: `rar.reward`.
        part: of the galleries that is searched here.
        threads: torch's.
    """

    def __init__(self, spec: RewardSpec, config: RewardConfig, *, part: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._spec, self._config = spec, config
        self._encoder = Encoder(spec.encoder, spec.catalogue)
        if config.shared_prefix:
            self._encoder.share_prefixes()
        self._labels = np.array(label_codes(spec.catalogue.open().column("product_id")))
        self._shards: dict[str, GalleryShard] = {}
        self._searchable: dict[str, np.ndarray] = {}
        for name, gallery in spec.galleries.items():
            rows = ray.get(gallery.rows[0])
            places = np.array_split(np.arange(len(rows)), len(gallery.parts))[part]
            there = rows[places]
            self._shards[name] = GalleryShard(ray.get(gallery.parts[part]), there, self._labels[there], places)
            self._searchable[name] = _with_positive(self._labels, rows)

    def check(self, gallery: str, queries: Sequence[Query]) -> None:
        """See that the queries can be scored.

        Raises:
            CatalogueError: a query has no positive in the gallery.
        """
        without = sorted({row for row, _ in queries if not self._searchable[gallery][row]})
        if without:
            raise CatalogueError(
                f"{len(without)} queries (catalogue rows {without[:5]}) have no positive in gallery {gallery!r}; "
                "leave them out, or widen rar.task.gallery"
            )

    def prepare(self, gallery: str, queries: Sequence[Query]) -> PreparedQueries:
        """Read images and tokenise."""
        side = self._spec.queries[gallery]
        rows: dict[Query, ModelInput] = {}
        tokens = 0
        for row, texts in _by_item(queries).items():
            built = self._encoder.item_rows(row, texts, inputs=side.inputs, title_columns=side.title_columns)
            rows.update(zip(((row, text) for text in texts), built, strict=True))
            tokens += group_tokens(built) if self._config.shared_prefix else sum(map(len, built))
        return PreparedQueries(gallery, rows, tokens)

    def encode(self, batch: Sequence[PreparedQueries]) -> list[EncodedQueries]:
        """Embed the queries of a batch; those of one item share what they begin with, whoever asked."""
        encoded = []
        for gallery in dict.fromkeys(each.gallery for each in batch):
            rows = {query: row for each in batch if each.gallery == gallery for query, row in each.rows.items()}
            grouped = _by_item(list(rows))
            queries = [(row, text) for row, texts in grouped.items() for text in texts]
            if self._config.shared_prefix:
                groups = [[rows[row, text] for text in texts] for row, texts in grouped.items()]
                embeddings = self._encoder.embed_groups(groups, tokens=self._config.tokens_per_batch)
            else:
                each_row = [rows[query] for query in queries]
                embeddings = self._encoder.embed_each(each_row, tokens=self._config.tokens_per_batch)
            encoded.append(EncodedQueries(gallery, queries, embeddings))
        return encoded

    def positives(self, gallery: str, rows: np.ndarray, embeddings: np.ndarray) -> Positives:
        """Scores of the queries' positives in this part; `rows` [Q], `embeddings` [Q, D]."""
        return self._shards[gallery].positives(embeddings, rows, self._labels[rows])

    def count_before(self, gallery: str, rows: np.ndarray, embeddings: np.ndarray, positives: Positives) -> np.ndarray:
        """How many items of this part stand before each positive of all parts."""
        return self._shards[gallery].count_before(embeddings, rows, positives)

    def measure(self, rows: np.ndarray, positives: Positives, counts: Sequence[np.ndarray]) -> np.ndarray:
        """[Q, len(KINDS)] of queries that passed `check`, from the counts of all parts."""
        ranking, k = ranking_of(rows, positives, counts), self._config.k
        measured = {
            "hit": metrics.hit_at_k(ranking, k),
            "recall": metrics.recall_at_k(ranking, k),
            "reciprocal_rank": metrics.reciprocal_rank(ranking),
            "ndcg": metrics.ndcg_at_k(ranking, k),
        }
        return np.stack([measured[kind] for kind in KINDS], axis=1)

    def rank(self, encoded: EncodedQueries) -> np.ndarray:
        """[Q, len(KINDS)] where this part is the whole gallery."""
        asked = encoded.gallery, encoded.rows, encoded.embeddings
        positives = merged([self.positives(*asked)])
        return self.measure(encoded.rows, positives, [self.count_before(*asked, positives)])

    def score(self, gallery: str, queries: Sequence[Query]) -> np.ndarray:
        """[Q, len(KINDS)] of queries, where this part is the whole gallery: what an actor does, in one call."""
        self.check(gallery, queries)
        (encoded,) = self.encode([self.prepare(gallery, queries)])
        found = dict(zip(encoded.queries, self.rank(encoded), strict=True))
        return np.stack([found[query] for query in queries])


def _by_item(queries: Sequence[Query]) -> dict[int, list[str]]:
    """Attribute texts, each once, by catalogue row."""
    grouped: dict[int, dict[str, None]] = {}
    for row, text in queries:
        grouped.setdefault(row, {})[text] = None
    return {row: list(texts) for row, texts in grouped.items()}


def _with_positive(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[catalogue rows] bool, whether a row has a positive other than itself among gallery rows [N]."""
    known = labels >= 0
    counts = np.bincount(labels[rows][known[rows]], minlength=int(labels.max(initial=-1)) + 1)
    inside = np.zeros(len(labels), dtype=np.int64)
    inside[rows] = 1
    found = np.zeros(len(labels), dtype=bool)
    found[known] = counts[labels[known]] - inside[known] > 0
    return found
