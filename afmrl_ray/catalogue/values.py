"""Values of a catalogue as its sources write them: text, ids, missing values, attributes in their several forms."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

MISSING_WORDS = frozenset({"nan", "NaN", "NAN", "None", "<NA>", "NaT", "null", "NULL", "#N/A"})
"""Texts that tables write for a missing value; as an id they would make one product of all items that lack one."""
_NAMES = ("name", "key", "attribute", "attribute_name", "k", "property")
_VALUES = ("value", "val", "v", "attribute_value")
_ROUNDED = re.compile(r"[+-]?\d(\.\d+)?[eE]\+?\d+")
_EXACT_FLOATS = 2**53
"""Integers above it are not all representable as floats."""


def text_value(value: Any) -> str | None:
    """A value as text, None where it is missing; whole floats are written as integers, containers as JSON."""
    if isinstance(value, str):
        text = value.strip()
        return None if not text or text in MISSING_WORDS else text
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def text_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of text, numbers or the like as text, see `text_value`.

    Raises:
        pa.ArrowException: it holds lists, maps or structs, or bytes that are no text.
        ValueError: it holds floats of which some are beyond exact integers: ids have lost digits.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_floating(kind):
        largest = pc.max(pc.abs(column.filter(pc.is_finite(column).fill_null(False)))).as_py()
        if largest is not None and largest >= _EXACT_FLOATS:
            raise ValueError(f"its numbers are floating point up to {largest:g}, which has lost digits")
    if pa.types.is_nested(kind):
        raise pa.ArrowTypeError(f"{kind} is no text")
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
        values = [text_value(_plain(value)) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(values, pa.string())])
    text = column.cast(pa.string())
    trimmed = pc.utf8_trim_whitespace(text)
    missing = pc.or_(pc.equal(trimmed, ""), pc.is_in(trimmed, value_set=pa.array(sorted(MISSING_WORDS))))
    return pc.if_else(missing.fill_null(True), pa.scalar(None, pa.string()), trimmed)


def _plain(value: Any) -> Any:
    """A decimal that is whole as an integer, any other one as its digits."""
    if value is not None and not isinstance(value, float | bool):
        return int(value) if value == value.to_integral_value() else str(value.normalize())
    return value


def is_rounded_id(text: str | None) -> bool:
    """Whether an id is a number in scientific notation, as spreadsheets write long ones: its last digits are lost."""
    return text is not None and _ROUNDED.fullmatch(text) is not None


def parse_source_attributes(value: Any) -> dict[str, str]:
    """Attributes of a row as an ordered dict; those with a missing value are left out.

    Accepted are null, a map or struct, a list of (name, value) pairs, of `{"name": ..., "value": ...}` (or `key`,
    `attribute`, `k`, `property`; `val`, `v`) or of objects with one name each, and any of these as JSON, as Python
    writes it, or as the text `name: value; name: value`. A list of values is joined by commas.

    Raises:
        ValueError: the value is nothing of this kind.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return {}
    if isinstance(value, str):
        if text_value(value) is None:
            return {}
        value = _from_text(value.strip())
        if value is None:
            return {}
    if isinstance(value, Mapping):
        pair = _named(value)
        pairs: Iterable[tuple[Any, Any]] = [pair] if pair else value.items()
    elif isinstance(value, list | tuple):
        pairs = [pair for entry in value for pair in _entry(entry)]
    else:
        raise ValueError(f"attributes: {str(value)[:80]!r} has no names and values")
    found: dict[str, str] = {}
    for name, content in pairs:
        key, text = text_value(name), _content(content)
        if key is not None and text is not None:
            found.setdefault(key, text)
    return found


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text[0] in "{[(":
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"attributes: {text[:80]!r} is not JSON") from error
    segments = [segment.partition(":") for segment in text.rstrip("; ").split(";")]
    if not all(name.strip() and mark and content.strip() for name, mark, content in segments):
        raise ValueError(f"attributes: {text[:80]!r} is neither JSON nor `name: value; name: value`")
    return [(name, content) for name, _, content in segments]


def _entry(entry: Any) -> list[tuple[Any, Any]]:
    """Pairs of one element of a list."""
    if isinstance(entry, Mapping):
        pair = _named(entry)
        if pair is not None:
            return [pair]
        if len(entry) == 1:
            return list(entry.items())
    elif isinstance(entry, list | tuple) and len(entry) == 2:
        return [(entry[0], entry[1])]
    raise ValueError(f"attributes: {str(entry)[:80]!r} is no pair of a name and a value")


def _named(entry: Mapping[Any, Any]) -> tuple[Any, Any] | None:
    """The pair of an object that holds a name and a value under these words."""
    by_word = {str(key).lower(): content for key, content in entry.items()}
    names = [word for word in _NAMES if word in by_word]
    values = [word for word in _VALUES if word in by_word]
    if len(names) == 1 and len(values) == 1 and len(by_word) == 2:
        return by_word[names[0]], by_word[values[0]]
    return None


def _content(content: Any) -> str | None:
    """A value as text: of a list all values, of an object its `value`.

    Raises:
        ValueError: an object has no `value`.
    """
    if isinstance(content, list | tuple):
        texts = [text for each in content if (text := _content(each)) is not None]
        return ", ".join(texts) or None
    if isinstance(content, Mapping):
        found = [content[word] for word in _VALUES if word in content]
        if len(found) != 1:
            raise ValueError(f"attributes: {str(content)[:80]!r} is no value")
        return _content(found[0])
    return text_value(content)
