"""Quality of generated attributes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afmrl_ray.attributes.quality import common_names, name_fractions, pair_scores, quality

RED, BLUE, LARGE, ROUND = ("color", "red"), ("color", "blue"), ("size", "large"), ("neckline", "round")


def test_pairs_are_counted_over_all_items():
    written = [(RED, LARGE), (BLUE,), ()]
    source = [(RED, ROUND), (RED,), (LARGE,)]
    found = pair_scores(written, source)
    assert found.precision == pytest.approx(1 / 3)
    assert found.recall == pytest.approx(1 / 4)
    assert found.f1 == pytest.approx(2 * 1 / (3 + 4))
    assert found.names_right == pytest.approx(2 / 3), "a wrong value with a right name counts as a right name"


def test_scores_are_zero_without_any_pair():
    assert pair_scores([()], [(RED,)]).f1 == 0
    assert pair_scores([(RED,)], [()]).recall == 0


PAIRS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz")).map(lambda found: tuple(found.items()))


@given(st.lists(st.tuples(PAIRS, PAIRS), min_size=1))
def test_f1_equals_that_of_the_set_of_all_pairs(items):
    written, source = zip(*items, strict=True)
    ours = {(index, pair) for index, own in enumerate(written) for pair in own}
    theirs = {(index, pair) for index, own in enumerate(source) for pair in own}
    found = pair_scores(written, source)
    assert found.f1 == pytest.approx(2 * len(ours & theirs) / max(1, len(ours) + len(theirs)))
    swapped = pair_scores(source, written)
    assert (found.precision, found.recall) == (swapped.recall, swapped.precision)


def test_names_are_counted_by_item_and_the_most_frequent_come_first():
    source = [(RED, LARGE), (BLUE, ROUND), (RED,)]
    assert name_fractions(source, ["size", "color", "fit"]) == {"size": 1 / 3, "color": 1.0, "fit": 0.0}
    assert common_names(source, most=2) == ["color", "neckline"]
    fractions = [name_fractions(source, [name])[name] for name in common_names(source, most=9)]
    assert all(one >= other for one, other in pairwise(fractions))


def test_items_without_source_attributes_do_not_count():
    found = quality([(RED,), (LARGE,)], [(RED, LARGE), ()])
    assert (found["precision"], found["recall"], found["items"]) == (1.0, 0.5, 1)
    assert found["names"] == {"color": {"written": 1.0, "source": 1.0}, "size": {"written": 0.0, "source": 1.0}}
    assert quality([(RED,)], [()]) == {}
