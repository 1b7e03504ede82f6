"""Cutting rows of different lengths into micro-batches that fit a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np


def cut_by_tokens(lengths: Sequence[int], budget: int, *, in_order: bool = False) -> list[list[int]]:
    """Cut rows so that every part, padded to its longest row, stays within a budget; a longer row stands alone.

    Args:
        lengths: [B] tokens of each row, visual ones counted.
        budget: tokens of a part, padding counted.
        in_order: keep neighbours together; else rows of like length share a part, so that less is padded.

    Returns:
        Row numbers of each part, each row in exactly one.
    """
    order = range(len(lengths)) if in_order else np.argsort(-np.asarray(lengths), kind="stable").tolist()
    parts: list[list[int]] = []
    longest = 0
    for row in order:
        longest = max(longest, lengths[row])
        if not parts or longest * (len(parts[-1]) + 1) > budget:
            parts.append([])
            longest = lengths[row]
        parts[-1].append(row)
    return parts


def cut_shared_prefix(
    owners: Sequence[int], prefixes: Sequence[int], lengths: Sequence[int], budget: int
) -> list[slice]:
    """Cut continuations of shared prefixes, in order, so that every part stays within a budget.

    A prefix counts once for all neighbours in a part that share it. Those that share one stay together where they fit a
    part; one that does not fit a part alone stands alone.

    Args:
        owners: [K] which prefix each continues; neighbours with equal values share it.
        prefixes: [K] tokens of each one's prefix, visual ones counted.
        lengths: [K] tokens of each continuation.
        budget: tokens of a part.

    Returns:
        Parts as slices of range(K).
    """
    parts: list[slice] = []
    start = stop = used = 0
    for _, group in groupby(range(len(owners)), key=lambda k: owners[k]):
        rows = list(group)
        prefix = prefixes[rows[0]]
        whole = prefix + sum(lengths[row] for row in rows)
        if used and (used + whole > budget):
            parts.append(slice(start, stop))
            start, used = stop, 0
        used += prefix
        for row in rows:
            if used + lengths[row] > budget and stop > start and row > rows[0]:
                parts.append(slice(start, stop))
                start, used = stop, prefix
            used += lengths[row]
            stop = row + 1
    return [*parts, slice(start, stop)]
