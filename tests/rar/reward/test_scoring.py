"""The plain code inside a reward actor against sorting the whole gallery."""

from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.errors import CatalogueError
from afmrl_ray.rar.reward.scoring import Scorer
from afmrl_ray.rar.reward.spec import METRICS
from tests.rar.conftest import reward_config

RTOL = 1e-5
"""Batches of another size round the query's embedding otherwise, which the temperature divides by 0.05."""
TEXTS = ("", "color: red; mood: busy", "color: red; size: xl", "shape: round")


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 4])
def test_every_metric_is_that_of_a_full_sort(reward, shared, k):
    scorer = Scorer(reward.spec, reward_config(k=k, shared_prefix=shared, tokens_per_batch=300), part=0, threads=1)
    queries = [(int(row), text) for text in TEXTS for row in reward.rows[:6]]
    found = scorer.score("train", queries)
    expected = reward.by_hand(queries, k)
    for place, name in enumerate(METRICS):
        np.testing.assert_allclose(found[:, place], expected[name], rtol=RTOL, err_msg=name)
        assert len(set(expected[name])) > 1, name


@pytest.mark.ray
def test_queries_of_an_item_share_its_prefix_across_requests(reward, monkeypatch):
    scorer = Scorer(reward.spec, reward_config(), part=0, threads=1)
    row, other = (int(row) for row in reward.rows[:2])
    requests = [scorer.prepare("train", queries) for queries in ([(row, "a: b")], [(other, ""), (row, "a: c")])]
    groups = []
    embed = scorer._encoder.embed_groups
    monkeypatch.setattr(
        scorer._encoder,
        "embed_groups",
        lambda rows, tokens: groups.extend(map(len, rows)) or embed(rows, tokens=tokens),
    )
    (encoded,) = scorer.encode(requests)
    assert groups == [2, 1]
    assert encoded.queries == [(row, "a: b"), (row, "a: c"), (other, "")]


@pytest.mark.ray
def test_a_query_without_a_positive_is_refused_by_its_row(reward):
    scorer = Scorer(reward.spec, reward_config(), part=0, threads=1)
    products = reward.catalogue.column("product_id")
    in_gallery = {products[row] for row in reward.rows}
    stranger = next(row for row, product in enumerate(products) if product not in in_gallery)
    with pytest.raises(CatalogueError, match=rf"1 queries \(catalogue rows \[{stranger}\]\) have no positive"):
        scorer.score("train", [(int(reward.rows[0]), ""), (stranger, "")])
