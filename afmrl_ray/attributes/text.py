"""The text form of attributes, `color: red; neckline: v-neck`, and its strict parser.

What the parser rejects gets the reward `rar.reward.invalid` in RAR.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Attributes = tuple[tuple[str, str], ...]
"""Ordered (name, value) pairs in normal form: lower case, single spaces, no `;` or `:`, no repeated name."""

InvalidReason = Literal["empty", "no_pair", "repeated_name", "too_many", "unfinished", "special_token"]
INVALID_REASONS: tuple[InvalidReason, ...] = get_args(InvalidReason)

SEPARATOR = ";"
"""Separates pairs."""
PAIR_MARK = ":"
"""Separates name and value of a pair."""

_SPECIAL_TOKEN = re.compile(r"<\|.*?\|>", re.DOTALL)
_DROPPED = re.compile(r"[;:]|<\||\|>")


@dataclass(frozen=True)
class InvalidAttributes:
    """Result of the parser for a text that is not valid attribute text.

    Attributes:
        reason: `unfinished` (no end-of-text token within the token limit), `special_token` (contains `<|...|>`),
            `empty`, `no_pair` (a segment between semicolons is not `name: value`), `repeated_name`, `too_many`.
    """

    reason: InvalidReason


def format_attributes(pairs: Iterable[tuple[str, str]]) -> str:
    """Join pairs in normal form to `name: value; name: value`; without pairs the text is empty."""
    return "; ".join(f"{name}: {value}" for name, value in pairs)


def normalise_attributes(attributes: Mapping[str, str | None] | Iterable[tuple[str, str | None]]) -> Attributes:
    """Bring attributes of a source into normal form, in their order.

    Semicolons, colons and the brackets of special tokens become spaces. Pairs with an empty name or value are dropped;
    of a repeated name the first value counts.
    """
    pairs = attributes.items() if isinstance(attributes, Mapping) else attributes
    found: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = fold(raw_name), fold(raw_value)
        if name and value:
            found.setdefault(name, value)
    return tuple(found.items())


def select_attributes(attributes: Mapping[str, str | None], names: Iterable[str] | None) -> Mapping[str, str | None]:
    """The attributes with the given names, in the order of the names; all attributes if `names` is none."""
    if names is None:
        return attributes
    return {name: attributes[name] for name in names if name in attributes}


def stored_attributes(text: str) -> Attributes:
    """The pairs of a stored attribute text, without a limit on their number; empty if the text is invalid."""
    found = parse_attributes(text, max_attributes=text.count(SEPARATOR) + 1)
    return () if isinstance(found, InvalidAttributes) else found


def parse_attributes(text: str, *, max_attributes: int, complete: bool = True) -> Attributes | InvalidAttributes:
    """Parse the output of a model; `parse(format(a)) == a` for non-empty `a` in normal form.

    A segment is split at its first colon; further colons belong to the value and become spaces. A trailing semicolon is
    allowed; every other deviation from the format makes the text invalid.

    Args:
        text: decoded completion up to its end-of-text token, special tokens included.
        max_attributes: maximum number of pairs.
        complete: whether the completion ended with its end-of-text token, within the token limit.
    """
    if not complete:
        return InvalidAttributes("unfinished")
    if _SPECIAL_TOKEN.search(text):
        return InvalidAttributes("special_token")
    if not text.strip():
        return InvalidAttributes("empty")
    found: dict[str, str] = {}
    for segment in text.rstrip().removesuffix(SEPARATOR).split(SEPARATOR):
        raw_name, _, raw_value = segment.partition(PAIR_MARK)
        name, value = fold(raw_name), fold(raw_value)
        if not (name and value):
            return InvalidAttributes("no_pair")
        if name in found:
            return InvalidAttributes("repeated_name")
        found[name] = value
    return InvalidAttributes("too_many") if len(found) > max_attributes else tuple(found.items())


def fold(text: str | None) -> str:
    """Name or value in normal form: lower case, single spaces; the marks of the text form become spaces."""
    return " ".join(_DROPPED.sub(" ", text or "").lower().split())
