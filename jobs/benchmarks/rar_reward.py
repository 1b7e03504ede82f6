"""The reward service against encoding full queries in process, and against a bare loop of the same work.

Scores are not cached between calls. The time of the service includes everything between request and response: Ray's
messages, images, tokens, encoder and ranks.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import ray

from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.models import VisionCacheConfig
from afmrl_ray.config.rar import RewardConfig
from afmrl_ray.rar.reward.client import RewardClient, RewardPool
from afmrl_ray.rar.reward.scoring import Scorer
from afmrl_ray.rar.reward.spec import METRICS, Gallery, Query, RewardSpec
from afmrl_ray.retrieval.embed import Encoder, EncoderRef
from jobs.benchmarks.harness import Comparison, compare, seconds
from jobs.benchmarks.tiny import SMALL, Bench, make_bench

IMAGE_PX, PRODUCTS, SUFFIXES, RUNNERS, ITEMS, THREADS = 392, 256, 8, 4, 4, 2
TRAIN = ItemSelector(split=("train",))
CONFIG = RewardConfig(k=5, cached_scores=0, pool={"num_workers": 1, "cpus_per_worker": THREADS})


class Runner:
    """A process that requests scores, as a rollout runner does."""

    def __init__(self, client: RewardClient) -> None:
        self._client = client

    def ask(self, queries: list[Query]) -> np.ndarray:
        """[Q] rewards."""
        return self._client.score("train", queries)


def queries_of(bench: Bench, items: int) -> list[Query]:
    """`items` items that have a positive, each with the attributes of `SUFFIXES` items."""
    catalogue = bench.catalogue
    rows, products = catalogue.rows(TRAIN).tolist(), catalogue.column("product_id")
    texts = list(dict.fromkeys(format_attributes(normalise_attributes(catalogue.item(r).attributes)) for r in rows))
    sizes = Counter(products[row] for row in rows)
    able = [row for row in rows if sizes[products[row]] > 1][:items]
    return [(row, texts[(place + index) % len(texts)]) for place, row in enumerate(able) for index in range(SUFFIXES)]


def make_spec(bench: Bench, vision: VisionCacheConfig) -> RewardSpec:
    """The benchmark's encoder, and its training items as a gallery with random embeddings."""
    rows = bench.catalogue.rows(TRAIN)
    drawn = np.random.default_rng(0).standard_normal((len(rows), bench.config.tiny.hidden_size)).astype(np.float32)
    return RewardSpec(
        encoder=EncoderRef(bench.checkpoint, bench.config.encoder.model_copy(update={"vision_cache": vision})),
        catalogue=bench.reference,
        queries={"train": TRAIN},
        galleries={"train": Gallery.put(bench.catalogue, rows, drawn)},
        version="bench",
    )


@contextmanager
def service(spec: RewardSpec, name: str) -> Iterator[RewardPool]:
    """A running reward service."""
    pool = RewardPool(spec, CONFIG, name=name)
    pool.wait_until_ready()
    yield pool
    pool.close()


def against_full_queries(bench: Bench, spec: RewardSpec, what: str) -> Comparison:
    """One item with its suffixes, through the service and as full queries in process."""
    encoder, scorer = Encoder(spec.encoder, spec.catalogue), Scorer(spec, CONFIG, part=0, threads=THREADS)
    queries = queries_of(bench, 1)
    rows, texts = [row for row, _ in queries], [text for _, text in queries]
    prepared = scorer.prepare("train", queries)
    (packed,) = scorer.encode([prepared])
    gap = float(np.abs(packed.embeddings - encoder.embed(rows, texts, inputs="both")).max())
    assert gap < 1e-5, f"embeddings differ by {gap:g}"
    full = [len(row) for row in prepared.inputs.values()]
    shared = (sum(full) - prepared.tokens) / (SUFFIXES - 1)
    items = len(bench.catalogue.rows(TRAIN))
    with service(spec, f"bench-full-{len(what)}") as pool:
        return compare(
            f"reward of {SUFFIXES} suffixes, {shared:.0f} shared + {np.mean(full) - shared:.0f} tokens{what}",
            "encoding full queries",
            seconds(lambda: pool.score("train", queries)),
            seconds(lambda: encoder.embed(rows, texts, inputs="both")),
            target=3.0,
            at_most=False,
            equality=f"embeddings equal within {gap:.0e}; ours ranks {items} items too",
            repeats=15,
            warmups=3,
        )


def against_bare_loop(bench: Bench, spec: RewardSpec) -> Comparison:
    """Concurrent runners, against a loop over their requests in this process."""
    scorer, queries = Scorer(spec, CONFIG, part=0, threads=THREADS), queries_of(bench, RUNNERS * ITEMS)
    size = ITEMS * SUFFIXES
    asked = [queries[start : start + size] for start in range(0, len(queries), size)]
    with service(spec, "bench-loop") as pool:
        runners = [ray.remote(num_cpus=0)(Runner).remote(pool.client()) for _ in asked]

        def ours() -> list[np.ndarray]:
            return ray.get([runner.ask.remote(own) for runner, own in zip(runners, asked, strict=True)])

        def bare() -> list[np.ndarray]:
            return [scorer.score("train", own)[:, METRICS.index(CONFIG.kind)] for own in asked]

        for mine, theirs in zip(ours(), bare(), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        return compare(
            f"reward service, {RUNNERS} runners, {ITEMS} items of {SUFFIXES} each",
            "bare loop, same work",
            seconds(ours),
            seconds(bare),
            target=1.15,
            equality="rewards equal",
            repeats=11,
            warmups=2,
        )


def comparisons() -> list[Comparison]:
    """Time the service against full queries, with and without cached image features, and against a loop.

    Raises:
        AssertionError: embeddings or rewards differ.
    """
    bench = make_bench(16, PRODUCTS, image_px=IMAGE_PX, tiny=SMALL)
    ray.init(num_cpus=4, include_dashboard=False, namespace="bench", log_to_driver=False, logging_level="ERROR")
    try:
        plain = make_spec(bench, VisionCacheConfig())
        kept = make_spec(bench, VisionCacheConfig(enabled=True, folder=tempfile.mkdtemp(prefix="afmrl-bench-")))
        parts: list[Callable[[], Comparison]] = [
            lambda: against_full_queries(bench, plain, ""),
            lambda: against_full_queries(bench, kept, ", images encoded before"),
            lambda: against_bare_loop(bench, plain),
        ]
        return [part() for part in parts]
    finally:
        ray.shutdown()
