"""The text form of attributes and its parser."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afmrl_ray.attributes.text import (
    INVALID_REASONS,
    InvalidAttributes,
    format_attributes,
    normalise_attributes,
    parse_attributes,
)

_wild = st.text(alphabet=st.one_of(st.sampled_from(";:<|> \n\tAbß"), st.characters()), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(_wild, st.one_of(st.none(), _wild)), max_size=6))
def test_normalised_attributes_parse_back_unchanged(pairs: list[tuple[str, str | None]]) -> None:
    attributes = normalise_attributes(pairs)
    parsed = parse_attributes(format_attributes(attributes), max_attributes=6)
    assert parsed == (attributes or InvalidAttributes("empty"))
    assert normalise_attributes(attributes) == attributes


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:; <|>", max_size=20))
def test_parsed_attributes_are_in_normal_form(text: str) -> None:
    parsed = parse_attributes(text, max_attributes=20)
    if isinstance(parsed, InvalidAttributes):
        assert parsed.reason in INVALID_REASONS
    else:
        assert parsed == normalise_attributes(parsed)
        assert len(parsed) == text.rstrip().removesuffix(";").count(";") + 1, "a segment was silently dropped"


def test_normalising_folds_case_and_space_drops_empty_pairs_and_keeps_order() -> None:
    source = {"Neck\nLine": " V-Neck ", "Ratio": "3:1; wide", "empty": " ", "none": None, "NECK line": "round"}
    assert normalise_attributes(source) == (("neck line", "v-neck"), ("ratio", "3 1 wide"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("red", "no_pair"),
        (";", "no_pair"),
        ("color: red;;", "no_pair"),
        ("color: red;; neck: v", "no_pair"),
        ("color: red; v-neck", "no_pair"),
        ("color:; neck: v", "no_pair"),
        (": red", "no_pair"),
        ("color: red; Color: blue", "repeated_name"),
        ("a: 1; b: 2; c: 3; d: 4", "too_many"),
        ("color: red<|image_pad|>", "special_token"),
        ("<|vision\nstart|>color: red", "special_token"),
    ],
)
def test_invalid_texts_have_a_reason(text: str, reason: str) -> None:
    assert parse_attributes(text, max_attributes=3) == InvalidAttributes(reason)  # type: ignore[arg-type]


def test_a_text_without_an_end_token_is_unfinished() -> None:
    assert parse_attributes("color: red", max_attributes=3) == (("color", "red"),)
    assert parse_attributes("color: red", max_attributes=3, complete=False) == InvalidAttributes("unfinished")


def test_a_trailing_semicolon_is_valid() -> None:
    assert parse_attributes("color: red; ", max_attributes=1) == (("color", "red"),)


def test_further_colons_belong_to_the_value() -> None:
    assert parse_attributes("Size: 10:30", max_attributes=1) == (("size", "10 30"),)
