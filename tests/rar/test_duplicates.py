"""Known duplicates of queries, by two keys, and that the reward service leaves them out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_ray.rar.duplicates import known_duplicates
from afmrl_ray.rar.reward.scoring import Scorer
from afmrl_ray.rar.reward.spec import METRICS
from afmrl_ray.retrieval.shards import merged
from tests.rar.conftest import reward_config

RED, BLUE = (("color", "red"), ("size", "xl")), (("color", "blue"),)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), threshold=st.sampled_from([-0.5, 0.0, 0.6, 1.0]))
def test_an_item_must_have_both_keys(seed, threshold):
    """Against a plain loop over all pairs, in a gallery that some queries are part of."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(-1, 6, 40).tolist()
    choices = [(), RED, RED[::-1], BLUE]
    attributes = {row: choices[draw.integers(4)] for row in range(40)}
    gallery = draw.permutation(40)[:30]
    embeddings = draw.standard_normal((30, 3)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = {}
    for query in range(40):
        positives = [i for i, row in enumerate(gallery) if labels[row] == labels[query] >= 0 and row != query]
        found = [
            int(row)
            for i, row in enumerate(gallery)
            if labels[row] != labels[query]
            and set(attributes[row]) == set(attributes[query]) != set()
            and any(float(embeddings[i] @ embeddings[j]) > threshold for j in positives)
        ]
        if found:
            expected[query] = sorted(found)
    found = known_duplicates(range(40), gallery, embeddings, labels=labels, attributes=attributes, threshold=threshold)
    assert {query: rows.tolist() for query, rows in found.items()} == expected
    assert expected or threshold >= 0


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_service_ranks_as_if_the_gallery_lacked_them(reward, parts):
    products = reward.catalogue.column("product_id")
    one, other = (int(row) for row in reward.rows[:2])
    left_out = np.array([row for row in reward.rows.tolist() if products[row] != products[one]][1::2])
    spec = replace(reward.gallery(parts), left_out={"train": {one: left_out}})
    scorers = [Scorer(spec, reward_config(), part=part, threads=1) for part in range(parts)]
    queries = [(one, "color: red"), (other, "color: red")]
    (encoded,) = scorers[0].encode([scorers[0].prepare("train", queries)])
    asked = encoded.gallery, encoded.rows, encoded.embeddings
    positives = merged([scorer.positives(*asked) for scorer in scorers])
    found = scorers[0].metrics(encoded.rows, positives, [scorer.compare(*asked, positives) for scorer in scorers])
    expected = [reward.by_hand(queries[:1], 4, left_out=left_out), reward.by_hand(queries[1:], 4)]
    for place, name in enumerate(METRICS):
        np.testing.assert_allclose(found[:, place], [values[name][0] for values in expected], rtol=1e-5, err_msg=name)
    assert reward.by_hand(queries[:1], 4)["log_softmax"] != expected[0]["log_softmax"]
