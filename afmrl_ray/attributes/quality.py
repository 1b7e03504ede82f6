"""How good written attributes are by themselves: pairs held against those that a source gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from afmrl_ray.attributes.text import Attributes

NAME_FRACTION = "rollout/name_fraction/"
"""Prefix of the metrics of RAR that give the fraction of valid completions with an attribute name."""


@dataclass(frozen=True)
class PairScores:
    """Written pairs against the source's, counted over all items (micro average).

    Attributes:
        precision: share of written pairs that the source has, name and value alike; 0 where none is written.
        recall: share of the source's pairs that are written; 0 where it has none.
        f1: their harmonic mean.
        names_right: share of written pairs whose name the source has, whatever the value.
    """

    precision: float
    recall: float
    f1: float
    names_right: float


def pair_scores(written: Sequence[Attributes], source: Sequence[Attributes]) -> PairScores:
    """Compare item by item; both in normal form, in the same order.

    Args:
        written: [N] attributes that a generator wrote, empty where they were invalid.
        source: [N] attributes of the source.
    """
    right = names = wrote = there = 0
    for own, truth in zip(written, source, strict=True):
        right += len(set(own) & set(truth))
        names += len({name for name, _ in own} & {name for name, _ in truth})
        wrote += len(own)
        there += len(truth)
    precision, recall = right / max(1, wrote), right / max(1, there)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return PairScores(precision, recall, f1, names / max(1, wrote))


def name_shares(written: Iterable[Attributes], names: Sequence[str]) -> dict[str, float]:
    """Share of items that have each of `names`; 0 where there are no items."""
    counts: Counter[str] = Counter()
    total = 0
    for attributes in written:
        total += 1
        counts.update(name for name, _ in attributes)
    return {name: counts[name] / max(1, total) for name in names}


def common_names(source: Iterable[Attributes], *, most: int) -> list[str]:
    """The `most` most frequent names, ties by alphabet."""
    counts = Counter(name for attributes in source for name, _ in attributes)
    return sorted(counts, key=lambda name: (-counts[name], name))[:most]


def quality(written: Sequence[Attributes], source: Sequence[Attributes], *, most_names: int = 20) -> dict[str, Any]:
    """JSON values of `pair_scores`, and by name the share of items that have it, written and in the source.

    Items without attributes in the source are left out; the result is empty where none has any.
    """
    known = [(own, truth) for own, truth in zip(written, source, strict=True) if truth]
    if not known:
        return {}
    own, truth = [pair[0] for pair in known], [pair[1] for pair in known]
    names = common_names(truth, most=most_names)
    wrote, has = name_shares(own, names), name_shares(truth, names)
    return {
        **asdict(pair_scores(own, truth)),
        "items": len(known),
        "names": {name: {"written": wrote[name], "source": has[name]} for name in names},
    }
