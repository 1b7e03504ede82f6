"""Quality of generated attributes: their pairs compared with those of a source."""

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
    """Generated pairs compared with the source's, micro-averaged over items.

    Attributes:
        precision: fraction of generated pairs that are in the source, name and value; 0 without generated pairs.
        recall: fraction of the source's pairs that are generated; 0 without pairs in the source.
        f1: harmonic mean of both.
        names_right: fraction of generated pairs whose name is in the source, with any value.
    """

    precision: float
    recall: float
    f1: float
    names_right: float


def pair_scores(written: Sequence[Attributes], source: Sequence[Attributes]) -> PairScores:
    """Compare attributes item by item, both in normal form.

    Args:
        written: [N] generated attributes, empty where they were invalid.
        source: [N] attributes of the source, in the same order.
    """
    right = names = generated = expected = 0
    for own, truth in zip(written, source, strict=True):
        right += len(set(own) & set(truth))
        names += len({name for name, _ in own} & {name for name, _ in truth})
        generated += len(own)
        expected += len(truth)
    precision, recall = right / max(1, generated), right / max(1, expected)
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return PairScores(precision, recall, f1, names / max(1, generated))


def name_fractions(written: Iterable[Attributes], names: Sequence[str]) -> dict[str, float]:
    """Fraction of items with an attribute of each of `names`; 0 without items."""
    counts: Counter[str] = Counter()
    total = 0
    for attributes in written:
        total += 1
        counts.update(name for name, _ in attributes)
    return {name: counts[name] / max(1, total) for name in names}


def common_names(source: Iterable[Attributes], *, most: int) -> list[str]:
    """The `most` most frequent names; ties in alphabetical order."""
    counts = Counter(name for attributes in source for name, _ in attributes)
    return sorted(counts, key=lambda name: (-counts[name], name))[:most]


def quality(written: Sequence[Attributes], source: Sequence[Attributes], *, most_names: int = 20) -> dict[str, Any]:
    """`pair_scores` and the fraction of items with each attribute name, generated and in the source, as JSON values.

    Items without attributes in the source are left out; the result is empty if no item is left.

    Args:
        written: [N] generated attributes, empty where they were invalid.
        source: [N] attributes of the source, in the same order.
        most_names: number of names, the source's most frequent ones.
    """
    known = [(own, truth) for own, truth in zip(written, source, strict=True) if truth]
    if not known:
        return {}
    own, truth = [pair[0] for pair in known], [pair[1] for pair in known]
    names = common_names(truth, most=most_names)
    wrote, has = name_fractions(own, names), name_fractions(truth, names)
    return {
        **asdict(pair_scores(own, truth)),
        "items": len(known),
        "names": {name: {"written": wrote[name], "source": has[name]} for name in names},
    }
