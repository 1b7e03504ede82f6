"""Queries of an evaluation as typed values: what they retrieved, and what each generator wrote about them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.runs import Stage


@dataclass(frozen=True)
class Hit:
    row: int
    item_id: str
    score: float
    right: bool


@dataclass(frozen=True)
class Missed:
    """A positive that was not found, and the attributes that it was searched with."""

    row: int
    item_id: str
    attributes: str


@dataclass(frozen=True)
class Example:
    """A query and what it retrieved, best first.

    Attributes:
        rank: place of its first positive, from 1; none where that was not kept.
        missed: a positive, for queries that are shown because they failed.
    """

    query_row: int
    item_id: str
    title: str
    attributes: str
    hits: list[Hit]
    rank: int | None = None
    missed: Missed | None = None


def read_examples(stage: Stage, name: str) -> list[Example]:
    """The output `examples` or `failures` of an evaluation; empty where it has none."""
    if name not in stage.outputs or not storage.exists(stage.output(name)):
        return []
    return [_example(record) for record in storage.read_json(stage.output(name))]


def _example(record: Mapping[str, Any]) -> Example:
    missed = record.get("missed")
    hits = [Hit(**hit) for hit in record["hits"]]
    return Example(**{**record, "hits": hits, "missed": Missed(**missed) if missed is not None else None})


AttributeResult = dict[str, list[tuple[str, str]]]
"""By item, attribute texts with the generator that wrote them, in the order of the generators."""


def written_by_round(found: Mapping[str, Stage], items: Iterable[str], refused: Collection[int]) -> AttributeResult:
    """What the generators of all rounds wrote about some items: distilled first, then after each round's RAR.

    Args:
        found: committed stages by name.
        items: of the items.
        refused: rounds that were not promoted, which labels tell.
    """
    items = list(items)
    texts: AttributeResult = {item: [] for item in items}
    number = 0
    while (stage := found.get(f"attributes-r{number}")) is not None:
        if "attributes" in stage.outputs and storage.exists(stage.output("attributes")):
            store = read_attributes(stage.output("attributes"))
            label = "distilled" if number == 0 else f"after RAR, round {number - 1}"
            label += " (refused)" if number - 1 in refused else ""
            for item in items:
                texts[item].append((label, store.text(item)))
        number += 1
    return texts


@dataclass(frozen=True)
class PairChange:
    """A pair of an attribute text, or one that is gone, held against the text before."""

    text: str
    kind: Literal["kept", "added", "changed", "removed"]


def pair_changes(before: str | None, after: str) -> list[PairChange]:
    """The pairs of `after` and what of `before` it lacks.

    Args:
        before: canonical attribute text; none = there was none before, so nothing is marked.
        after: canonical attribute text.
    """
    old, new = _pairs(before or ""), _pairs(after)
    if before is None:
        return [PairChange(f"{name}: {value}", "kept") for name, value in new.items()]
    found = []
    for name, value in new.items():
        kind: Literal["kept", "added", "changed"] = "added"
        if name in old:
            kind = "kept" if old[name] == value else "changed"
        found.append(PairChange(f"{name}: {value}", kind))
    return found + [PairChange(f"{name}: {value}", "removed") for name, value in old.items() if name not in new]


def _pairs(text: str) -> dict[str, str]:
    segments = (segment.partition(":") for segment in text.split(";") if segment.strip())
    return {name.strip(): value.strip() for name, _, value in segments}
