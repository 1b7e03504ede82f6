"""Cutting sequences of different lengths into micro-batches that fit a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np


def cut_by_tokens(lengths: Sequence[int], budget: int, *, in_order: bool = False) -> list[list[int]]:
    """Cut sequences so that every part, padded to its longest sequence, stays within a budget.

    A sequence longer than the budget is a part of its own.

    Args:
        lengths: [B] tokens of each sequence, visual ones counted.
        budget: tokens of a part, padding counted.
        in_order: keep neighbours together; otherwise sequences of similar length share a part, which saves padding.

    Returns:
        Indices of each part; each sequence is in exactly one.
    """
    order = range(len(lengths)) if in_order else np.argsort(-np.asarray(lengths), kind="stable").tolist()
    parts: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if not parts or longest * (len(parts[-1]) + 1) > budget:
            parts.append([])
            longest = lengths[index]
        parts[-1].append(index)
    return parts


def cut_shared_prefix(
    owners: Sequence[int], prefixes: Sequence[int], lengths: Sequence[int], budget: int
) -> list[slice]:
    """Cut continuations of shared prefixes, in order, so that every part stays within a budget.

    A prefix counts once for all neighbours in a part that share it. Continuations of one prefix stay together if they
    fit a part; a continuation that exceeds the budget with its prefix is a part of its own.

    Args:
        owners: [K] which prefix each continues; neighbours with equal values share it.
        prefixes: [K] tokens of each continuation's prefix, visual ones counted.
        lengths: [K] tokens of each continuation.
        budget: tokens of a part.

    Returns:
        Parts as slices of range(K).
    """
    parts: list[slice] = []
    start = stop = used = 0
    for _, group in groupby(range(len(owners)), key=lambda k: owners[k]):
        members = list(group)
        prefix = prefixes[members[0]]
        whole = prefix + sum(lengths[k] for k in members)
        if used and (used + whole > budget):
            parts.append(slice(start, stop))
            start, used = stop, 0
        used += prefix
        for k in members:
            if used + lengths[k] > budget and stop > start and k > members[0]:
                parts.append(slice(start, stop))
                start, used = stop, prefix
            used += lengths[k]
            stop = k + 1
    return [*parts, slice(start, stop)]
