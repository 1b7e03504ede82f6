"""Cutting rows of different lengths into micro-batches that fit a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence

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
