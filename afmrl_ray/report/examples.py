"""Example queries of an evaluation: retrieved items, and the attributes that each generator gave them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.runs import Stage, StageName


@dataclass(frozen=True)
class Hit:
    """A retrieved item; `right` = it is a positive of the query."""

    row: int
    item_id: str
    score: float
    right: bool


@dataclass(frozen=True)
class Missed:
    """A positive that was not retrieved, with the attributes that it was embedded with."""

    row: int
    item_id: str
    attributes: str


@dataclass(frozen=True)
class Example:
    """A query and the items that it retrieved, best first.

    Attributes:
        rank: rank of its first positive, from 1; None where that was not recorded.
        missed: one of its positives, for queries that are shown as failures.
    """

    query_row: int
    item_id: str
    title: str
    attributes: str
    hits: list[Hit]
    rank: int | None = None
    missed: Missed | None = None


def read_examples(stage: Stage, name: str) -> list[Example]:
    """The output `examples` or `failures` of an evaluation stage; empty if the stage does not have it."""
    if name not in stage.outputs or not storage.exists(stage.output(name)):
        return []
    return [_example(record) for record in storage.read_json(stage.output(name))]


def _example(record: Mapping[str, Any]) -> Example:
    missed = record.get("missed")
    hits = [Hit(**hit) for hit in record["hits"]]
    return Example(**{**record, "hits": hits, "missed": Missed(**missed) if missed is not None else None})


GeneratedAttributes = dict[str, list[tuple[str, str]]]
"""Pairs of generator and attribute text by item ID, in the order of the generators."""


def attributes_by_round(
    found: Mapping[StageName, Stage], items: Iterable[str], refused: Collection[int]
) -> GeneratedAttributes:
    """Attribute texts of all generators for some items: the distilled one first, then those after each round's RAR.

    Args:
        found: committed stages by name.
        items: item IDs.
        refused: rounds that were not promoted; their labels say so.
    """
    items = list(items)
    texts: GeneratedAttributes = {item: [] for item in items}
    number = 0
    while (stage := found.get(StageName("attributes", number))) is not None:
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
    """A name-value pair, and how it differs from the text of the generator before."""

    text: str
    kind: Literal["kept", "added", "changed", "removed"]


def pair_changes(before: str | None, after: str) -> list[PairChange]:
    """The pairs of `after`, then those of `before` that are removed.

    Args:
        before: canonical attribute text; None = `after` is the first text, so that all its pairs count as kept.
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
