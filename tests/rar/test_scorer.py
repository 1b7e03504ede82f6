"""The plain code inside a reward actor against sorting the whole gallery."""

from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.errors import CatalogueError
from afmrl_ray.rar.reward_spec import KINDS
from afmrl_ray.rar.scorer import Scorer
from tests.rar.conftest import reward_config

TEXTS = ("", "color: red; mood: busy", "color: red; size: xl", "shape: round")


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 4])
def test_every_kind_is_that_of_a_full_sort(reward, shared, k):
    scorer = Scorer(reward.spec, reward_config(k=k, shared_prefix=shared, tokens_per_batch=300), part=0, threads=1)
    queries = [(int(row), text) for text in TEXTS for row in reward.rows[:6]]
    found = scorer.score("train", queries)
    expected = reward.by_hand(queries, k)
    for place, kind in enumerate(KINDS):
        np.testing.assert_allclose(found[:, place], expected[kind], err_msg=kind)
        assert len(set(expected[kind])) > 1, kind


@pytest.mark.ray
def test_queries_of_one_item_share_its_prefix_whoever_asked(reward, monkeypatch):
    scorer = Scorer(reward.spec, reward_config(), part=0, threads=1)
    row, other = (int(row) for row in reward.rows[:2])
    asked = [scorer.prepare("train", queries) for queries in ([(row, "a: b")], [(other, ""), (row, "a: c")])]
    groups = []
    embed = scorer._encoder.embed_groups
    monkeypatch.setattr(
        scorer._encoder,
        "embed_groups",
        lambda rows, tokens: groups.extend(map(len, rows)) or embed(rows, tokens=tokens),
    )
    (encoded,) = scorer.encode(asked)
    assert groups == [2, 1]
    assert encoded.queries == [(row, "a: b"), (row, "a: c"), (other, "")]


@pytest.mark.ray
def test_a_query_without_a_positive_is_the_users_error_and_is_named(reward):
    scorer = Scorer(reward.spec, reward_config(), part=0, threads=1)
    products = reward.catalogue.column("product_id")
    there = {products[row] for row in reward.rows}
    stranger = next(row for row, product in enumerate(products) if product not in there)
    with pytest.raises(CatalogueError, match=rf"1 queries \(catalogue rows \[{stranger}\]\) have no positive"):
        scorer.score("train", [(int(reward.rows[0]), ""), (stranger, "")])
