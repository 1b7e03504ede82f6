"""How much the gradients of two halves of a batch agree."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine(left: list[Tensor], right: list[Tensor]) -> float:
    """Cosine of two vectors that are given in parts; not a number if one of them is 0."""
    products = [
        torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
        for one, other in ((left, right), (left, left), (right, right))
    ]
    norm = float((products[1] * products[2]).sqrt())
    return float(products[0]) / norm if norm > 0 else float("nan")
