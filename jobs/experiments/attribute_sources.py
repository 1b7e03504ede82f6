"""Sources of a query's attributes: their texts, their latency and the retrieval with them."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from afmrl_ray import storage
from afmrl_ray.attributes.store import AttributeStore, read_attributes
from afmrl_ray.attributes.text import SEPARATOR
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.config import validate
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.errors import ConfigError, StorageError
from afmrl_ray.models.annotate import Annotator, GeneratorRef
from afmrl_ray.retrieval.embed import Encoder, EncoderRef
from afmrl_ray.retrieval.evaluate import interval, rank
from afmrl_ray.retrieval.metrics import hit_at_k
from afmrl_ray.runs import RunDirectory, Stage

_BATCH = 64


@dataclass(frozen=True)
class AttributeSource:
    """A source of a query's attributes.

    Attributes:
        name: name in the table.
        texts: attribute text of every query.
        get: attribute text of one catalogue row, timed; None = queries have no attributes.
        with_attributes: whether queries have attributes, and the gallery too if the protocol uses them there.
    """

    name: str
    texts: list[str]
    get: Callable[[int], str] | None
    with_attributes: bool = True


@dataclass(frozen=True)
class Measurement:
    """A measured source: hit@1 over all queries with its 95 % interval, and milliseconds per query.

    Attributes:
        milliseconds: median of `samples`.
        samples: milliseconds per query of every repeat.
    """

    name: str
    hit1: float
    low: float
    high: float
    milliseconds: float
    samples: list[float]


class SearchedRound:
    """Encoder, generator, items and stored attributes of one round, with the queries of the primary protocol.

    Args:
        run: a run with this round evaluated.
        number: the round.

    Raises:
        ConfigError: the primary protocol is not a retrieval protocol, or does not use attributes.
        StorageError: a stage is not committed.
    """

    def __init__(self, run: RunDirectory, number: int) -> None:
        config = validate(run.read_run()["config"])
        encoder, generator, attributes, catalogue = (
            _committed(run, name)
            for name in (f"agcl-r{number}", f"rar-r{number}", f"attributes-r{number + 1}", "catalogue")
        )
        path = storage.absolute(config.catalogue.path or catalogue.output("catalogue"))
        reference = CatalogueRef(path, config.catalogue, catalogue.metrics["fingerprint"])
        protocol = next(p for p in config.evaluation.protocols if p.name == config.evaluation.primary_protocol)
        if not isinstance(protocol, RetrievalProtocol):
            raise ConfigError(f"evaluation.primary_protocol {protocol.name!r} is no retrieval protocol")
        if protocol.with_attributes == "none":
            raise ConfigError(f"evaluation.primary_protocol {protocol.name!r} does not use attributes")
        self.name, self.config, self.protocol = storage.split(run.path)[1], config, protocol
        self.catalogue: StagedCatalogue = reference.open()
        self.store: AttributeStore = read_attributes(attributes.output("attributes"))
        self.annotator = Annotator(GeneratorRef(generator.output("model"), config.generator), reference)
        self.encoder = Encoder(EncoderRef(encoder.output("model"), config.encoder), reference)
        self.queries, self.gallery = (self.catalogue.rows(items) for items in (protocol.query, protocol.gallery))
        self._galleries: dict[bool, np.ndarray] = {}

    def stored(self, row: int) -> str:
        """The attribute text that the run stored; empty if it is invalid."""
        return self.store.text(self.encoder.items[row])

    def sources(self, cuts: Sequence[int]) -> list[AttributeSource]:
        """All sources, ordered by expected latency; `cuts` are the numbers of pairs to generate."""
        full = [self.stored(row) for row in self.queries.tolist()]
        cache = {self._key(row): text for row, text in zip(self.queries.tolist(), full, strict=True)}

        def generated(pairs: int | None) -> Callable[[int], str]:
            return lambda row: self.annotator.annotate([row], max_pairs=pairs)[0][0]

        return [
            AttributeSource("no attributes", [""] * len(full), None, with_attributes=False),
            AttributeSource("all, from a cache", full, lambda row: cache[self._key(row)]),
            *(AttributeSource(f"first {m}", self._first(full, m, generated(m)), generated(m)) for m in cuts),
            AttributeSource("all, generated", full, generated(None)),
        ]

    def _first(self, full: Sequence[str], pairs: int, generate: Callable[[int], str]) -> list[str]:
        """The first pairs of every query: of its stored text, or generated if that is invalid."""
        rows = zip(self.queries.tolist(), full, strict=True)
        return [
            first_pairs(text, pairs) if text else generate(row)
            for row, text in tqdm(rows, desc=f"first {pairs}", total=len(full))
        ]

    def _key(self, row: int) -> str:
        """The key of a cache: a digest of image and title."""
        title = self.catalogue.title(row, self.config.generator.title_columns)
        return hashlib.sha256(self.catalogue.image_bytes(row) + title.encode()).hexdigest()

    def check(self, sources: Sequence[AttributeSource], sample: Sequence[int]) -> None:
        """Make sure that every source gives the attributes that are searched with.

        Args:
            sample: indices of queries.

        Raises:
            RuntimeError: a source gives other attributes.
        """
        for source in sources:
            for index in tqdm(sample, desc=f"checking {source.name}"):
                row = int(self.queries[index])
                if source.get is None:
                    continue
                if (found := source.get(row)) != source.texts[index]:
                    raise RuntimeError(
                        f"{source.name}: {found!r} for {self.encoder.items[row]}, searched with {source.texts[index]!r}"
                    )

    def time(self, sources: Sequence[AttributeSource], sample: Sequence[int], repeats: int) -> dict[str, list[float]]:
        """Milliseconds per query by source and repeat, sources in turn; a first round is not counted."""
        found: dict[str, list[float]] = {source.name: [] for source in sources}
        for repeat in tqdm(range(repeats + 1), desc="timing"):
            for source in sources:
                began = time.perf_counter()
                for index in sample:
                    row = int(self.queries[index])
                    self._embed([row], [source.get(row) if source.get is not None else ""], self.protocol.query)
                if repeat:
                    found[source.name].append(1e3 * (time.perf_counter() - began) / len(sample))
        return found

    def measure(self, source: AttributeSource, samples: list[float]) -> Measurement:
        """Search with all queries; `samples` are the source's timings."""
        with_attributes = source.with_attributes and self.protocol.with_attributes == "both"
        if with_attributes not in self._galleries:
            texts = [self.stored(row) if with_attributes else "" for row in self.gallery.tolist()]
            self._galleries[with_attributes] = self._all(self.gallery, texts, self.protocol.gallery, "gallery")
        queries = self._all(self.queries, source.texts, self.protocol.query, source.name)
        ranking = rank(
            self.catalogue,
            self.protocol.label,
            self.queries,
            queries,
            self.gallery,
            self._galleries[with_attributes],
            depth=1,
        )
        evaluation = self.config.evaluation
        hit = interval(hit_at_k(ranking, 1), samples=evaluation.bootstrap_samples, seed=self.config.run.seed)
        low, high = (hit.mean if end is None else end for end in (hit.low, hit.high))
        return Measurement(source.name, hit.mean, low, high, statistics.median(samples), samples)

    def _all(self, rows: np.ndarray, texts: list[str], items: Any, name: str) -> np.ndarray:
        starts = tqdm(range(0, len(rows), _BATCH), desc=f"embedding {name}")
        parts = [self._embed(rows[i : i + _BATCH].tolist(), texts[i : i + _BATCH], items) for i in starts]
        return np.concatenate(parts)

    def _embed(self, rows: list[int], texts: list[str], items: Any) -> np.ndarray:
        return self.encoder.embed(rows, texts, inputs=items.inputs, title_columns=items.title_columns)


def _committed(run: RunDirectory, name: str) -> Stage:
    stage = run.committed(name)
    if stage is None:
        raise StorageError(f"{run.path}: stage {name} is not committed; run the round first, or set another --round")
    return stage


def first_pairs(text: str, count: int) -> str:
    """The first pairs of a canonical attribute text."""
    return f"{SEPARATOR} ".join(text.split(f"{SEPARATOR} ")[:count])
