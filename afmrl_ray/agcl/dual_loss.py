"""Objectives of dual encoders: CLIP's image-text contrast, and what FG-CLIP adds. Pure functions of tensors.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), section
2.3; Xie et al., "FG-CLIP: Fine-Grained Visual and Textual Alignment" (ICML 2025): regions against their phrases, and a
image against texts that differ from its own in one attribute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afmrl_ray.agcl.loss import weighted_info_nce


def contrast(rows: Tensor, columns: Tensor, positives: Tensor, *, temperature: float, negatives: Tensor) -> Tensor:
    """InfoNCE of rows against columns, summed over the rows.

    Args:
        rows: [n, D] of unit length.
        columns: [m, D] of unit length.
        positives: [n] the column that belongs to each row.
        temperature: divisor of the similarities.
        negatives: [n, m] bool, whether a column repels a row; the row's own never does.

    Returns:
        Scalar; 0 where there are no rows.
    """
    if not len(rows):
        return columns.sum() * 0
    mean, _ = weighted_info_nce(rows @ columns.T, positives, temperature=temperature, negative_mask=negatives)
    return mean * len(rows)


def hard_text_loss(images: Tensor, texts: Tensor, there: Tensor, *, temperature: float) -> Tensor:
    """An image's own text against changed ones, summed over the images.

    Args:
        images: [n, D] of unit length.
        texts: [n, 1 + K, D] of unit length, the true one first.
        there: [n, 1 + K] bool, whether a text exists; an image without a changed text counts for nothing.
        temperature: divisor of the similarities.

    Returns:
        Scalar; 0 where no image has a changed text.
    """
    usable = there[:, 0] & there[:, 1:].any(1)
    if not bool(usable.any()):
        return (images.sum() + texts.sum()) * 0
    logits = torch.einsum("nd,nkd->nk", images[usable], texts[usable]) / temperature
    logits = logits.masked_fill(~there[usable], float("-inf"))
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")
