from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import ray

from afmrl_ray.attributes.text import InvalidAttributes
from afmrl_ray.config.catalogue import SideConfig
from afmrl_ray.config.models import EncoderConfig
from afmrl_ray.config.train import RewardConfig
from afmrl_ray.errors import RewardServiceError
from afmrl_ray.rar.reward import Gallery, RewardPool, RewardSpec, parse_completions, reward_completions
from afmrl_ray.retrieval.embed import Encoder, EncoderRef
from tests.rar.conftest import PICTURE

SIDE = SideConfig()


def test_only_the_parser_gives_the_invalid_reward_and_what_it_refused_is_never_scored():
    texts = [("color: red", True), ("color: red", False), ("nonsense", True), ("size: xl", True)]
    parsed = parse_completions(texts, max_attributes=4)
    assert [isinstance(p, InvalidAttributes) for p in parsed] == [False, True, True, False]
    asked = []

    def score(queries):
        asked.extend(queries)
        return np.array([0.0, math.nan])

    rewards = reward_completions([5, 5, 6, 7], parsed, score, invalid=-0.1)
    assert asked == [(5, "color: red"), (7, "size: xl")]
    np.testing.assert_array_equal(rewards, [0.0, -0.1, -0.1, math.nan])


def test_nothing_valid_asks_nothing():
    parsed = parse_completions([("", True)], max_attributes=4)
    rewards = reward_completions([1], parsed, lambda queries: pytest.fail("asked"), invalid=-0.1)
    np.testing.assert_array_equal(rewards, [-0.1])


@pytest.fixture(scope="module")
def encoder_ref(tiny_checkpoints) -> EncoderRef:
    return EncoderRef(tiny_checkpoints["encoder"], EncoderConfig(picture=PICTURE))


@pytest.fixture(scope="module")
def service(ray_local, encoder_ref, tiny_catalogue_ref):
    catalogue = tiny_catalogue_ref.open()
    rows = catalogue.rows(SIDE)
    encoder = Encoder(encoder_ref, tiny_catalogue_ref)
    embeddings = encoder.embed(rows.tolist(), [""] * len(rows), inputs="both")
    spec = RewardSpec(
        encoder=encoder_ref,
        catalogue=tiny_catalogue_ref,
        queries={"train": SIDE},
        galleries={"train": Gallery(rows, [ray.put(embeddings)])},
        version="v1",
    )
    return spec, encoder, rows, embeddings


def pool_of(spec: RewardSpec, name: str, **changes) -> RewardPool:
    config = RewardConfig(
        **{"k": 4, "pool": {"num_workers": 2, "cpus_per_worker": 0.5, "batch_size": 3}, "timeout_s": 60, **changes}
    )
    return RewardPool(spec, config, name=name)


def by_hand(service, catalogue, queries, k: int) -> list[float]:
    """recall@k with a loop: own item left out, ties by item id."""
    _, encoder, rows, embeddings = service
    products, items = catalogue.column("product_id"), catalogue.column("item_id")
    found = []
    for row, text in queries:
        scores = (encoder.embed([row], [text], inputs="both") @ embeddings.T)[0]
        others = [(-scores[i], items[r], products[r]) for i, r in enumerate(rows.tolist()) if r != row]
        right = [product == products[row] for _, _, product in sorted(others)]
        found.append(sum(right[:k]) / sum(right))
    return found


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_scores_are_the_recall_of_the_enriched_query_also_after_an_actor_was_killed(service, tiny_catalogue_ref):
    spec, _, rows, _ = service
    pool = pool_of(spec, "test-recall")
    queries = [(int(row), text) for row in rows[:5] for text in ("", "color: red; mood: busy")]
    expected = by_hand(service, tiny_catalogue_ref.open(), queries, 4)
    np.testing.assert_allclose(pool.score("train", queries), expected)
    assert len(set(expected)) > 1
    pid = ray.get(pool.actors[0].__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    np.testing.assert_allclose(pool.score("train", queries), expected)
    pool.close()


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_equal_queries_are_scored_once(service, monkeypatch):
    spec, _, rows, _ = service
    pool = pool_of(spec, "test-dedup", pool={"num_workers": 1, "cpus_per_worker": 0.5, "batch_size": 100})
    sent = []
    original = RewardPool._round

    def spy(self, gallery, todo, attempt, found):
        sent.extend(query for _, chunk in todo for query in chunk)
        return original(self, gallery, todo, attempt, found)

    monkeypatch.setattr(RewardPool, "_round", spy)
    query = (int(rows[0]), "color: red")
    scores = pool.score("train", [query, (int(rows[1]), ""), query, query])
    assert sent == [query, (int(rows[1]), "")]
    assert scores[0] == scores[2] == scores[3]
    pool.close()


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_what_the_service_lost_is_nan_and_too_much_of_it_ends_the_job(service):
    spec, _, rows, _ = service
    queries = [(int(row), "") for row in rows[:6]]
    pool = pool_of(spec, "test-lost", max_retries=0, max_failed_share=0.5)
    pool.score("train", queries)
    ray.kill(pool.actors[1], no_restart=True)
    scores = pool.score("train", queries)
    assert np.isnan(scores[3:]).all()
    assert not np.isnan(scores[:3]).any()
    pool.close()
    pool = pool_of(spec, "test-lost-too-much", max_retries=1, max_failed_share=0.1)
    for actor in pool.actors:
        ray.kill(actor, no_restart=True)
    with pytest.raises(RewardServiceError, match="6 of 6 rewards failed after 1 retries"):
        pool.score("train", queries)


class FailingScorer:
    """Runs out of memory on one query and holds a wrong catalogue on another."""

    def score(self, gallery, queries):
        if any(text == "large" for _, text in queries):
            raise MemoryError("no memory left")
        if any(text == "wrong" for _, text in queries):
            raise ValueError("no positive")
        return "v1", [1.0] * len(queries)


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_an_error_inside_an_actor_is_nan_unless_the_catalogue_is_to_blame(service):
    spec, _, rows, _ = service
    pool = pool_of(spec, "test-error", max_retries=1, max_failed_share=0.9)
    pool.close()
    pool.actors = [ray.remote(num_cpus=0.5)(FailingScorer).remote() for _ in range(2)]
    queries = [(int(row), "large" if place == 4 else "") for place, row in enumerate(rows[:6])]
    np.testing.assert_array_equal(pool.score("train", queries), [1, 1, 1, math.nan, math.nan, math.nan])
    with pytest.raises(ValueError, match="no positive"):
        pool.score("train", [(1, "wrong")])
    pool.close()


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_reply_about_another_gallery_is_refused(service):
    spec, _, rows, _ = service
    pool = pool_of(spec, "test-version")
    pool._spec = RewardSpec(spec.encoder, spec.catalogue, spec.queries, spec.galleries, "v2")
    with pytest.raises(RewardServiceError, match="searched gallery v1, not v2"):
        pool.score("train", [(int(rows[0]), "")])
    pool.close()
