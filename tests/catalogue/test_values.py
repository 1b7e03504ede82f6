"""Text, ids, missing values and attributes, in the forms in which sources write them."""

from __future__ import annotations

import decimal
import json

import pyarrow as pa
import pytest

from afmrl_ray.catalogue.values import is_rounded_id, parse_source_attributes, text_column, text_value

NAN = float("nan")
PAIRS = {"color": "red", "material": "steel"}


@pytest.mark.parametrize(
    "value",
    [
        PAIRS,
        list(PAIRS.items()),
        [list(pair) for pair in PAIRS.items()],
        [{"name": name, "value": value} for name, value in PAIRS.items()],
        [{"Key": name, "Value": value} for name, value in PAIRS.items()],
        [{"attribute": name, "val": value} for name, value in PAIRS.items()],
        [{name: value} for name, value in PAIRS.items()],
        {**PAIRS, "size": None, "brand": NAN, "": "x", "note": " "},
        {"color": ["red"], "material": {"value": "steel"}},
        "color: red; material: steel;",
        str(PAIRS),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_all_forms_give_the_same_pairs(value, as_json):
    if as_json and not isinstance(value, str):
        value = json.dumps(value)
    assert parse_source_attributes(value) == PAIRS


@pytest.mark.parametrize("value", [None, "", "  ", "null", "NaN", NAN, {}, [], "{}", "[]"])
def test_nothing_gives_no_pairs(value):
    assert parse_source_attributes(value) == {}


@pytest.mark.parametrize(
    "value",
    ['["red", "ab", "steel"]', ["ab", "cd"], "[1, 2]", "red, steel", "{broken", "7", 7, True, [{"a": 1, "b": 2}]],
)
def test_what_has_no_names_is_refused(value):
    with pytest.raises(ValueError, match=r"^attributes: "):
        parse_source_attributes(value)


def test_values_are_written_as_people_write_them():
    found = parse_source_attributes({"volume": 7.0, "weight": 1.5, "organic": True, "sizes": ["S", "M", None]})
    assert found == {"volume": "7", "weight": "1.5", "organic": "true", "sizes": "S, M"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, "7"), (7.0, "7"), (7.5, "7.5"), (" a ", "a"), (NAN, None), (float("inf"), None), ("nan", None), ("", None),
     (None, None), (True, "true"), ("007", "007"), (4006381333931.0, "4006381333931")],
)  # fmt: skip
def test_numbers_and_missing_values_as_text(value, expected):
    assert text_value(value) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([7.0, NAN, None, 2.0**52]), ["7", None, None, "4503599627370496"]),
        (pa.array([1, None]), ["1", None]),
        (pa.array(["a ", "", "nan", "<NA>", None]), ["a", None, None, None, None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([1.0, NAN]).dictionary_encode(), ["1", None]),
        (pa.array([decimal.Decimal("7.00"), decimal.Decimal("7.50")]), ["7", "7.5"]),
        (pa.array([True, None]), ["true", None]),
        (pa.array([b"a", None]), ["a", None]),
    ],
)
def test_columns_become_text(values, expected):
    found = text_column(pa.chunked_array([values]))
    assert found.to_pylist() == expected
    assert found.type == pa.string()


def test_floats_that_have_lost_digits_are_refused():
    with pytest.raises(ValueError, match="has lost digits"):
        text_column(pa.chunked_array([pa.array([1.0, 1.2345678901234568e19])]))


@pytest.mark.parametrize(("text", "rounded"), [("4.00638E+12", True), ("4e12", True), ("4E", False), ("E12", False),
                                               ("12e", False), (None, False), ("4006381333931", False)])  # fmt: skip
def test_ids_that_a_spreadsheet_has_rounded_are_known(text, rounded):
    assert is_rounded_id(text) is rounded
