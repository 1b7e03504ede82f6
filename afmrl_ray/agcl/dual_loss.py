"""Auxiliary objectives of dual encoders: CLIP's image-text contrast, and those of FG-CLIP. Pure functions of tensors.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), section
2.3; Xie et al., "FG-CLIP: Fine-Grained Visual and Textual Alignment" (ICML 2025): regions against their phrases, and an
image against texts that differ from its own in one attribute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afmrl_ray.agcl.loss import weighted_info_nce


def summed_info_nce(
    queries: Tensor, candidates: Tensor, positives: Tensor, *, temperature: float, negative_mask: Tensor
) -> Tensor:
    """InfoNCE of queries against candidates, summed over the queries.

    Args:
        queries: [Q, D] of unit length.
        candidates: [C, D] of unit length.
        positives: [Q] column of each query's positive.
        temperature: divides the similarities.
        negative_mask: [Q, C] bool, True = the column counts as a negative of the query.

    Returns:
        Scalar; 0 without queries.
    """
    if not len(queries):
        return candidates.sum() * 0
    mean, _ = weighted_info_nce(queries @ candidates.T, positives, temperature=temperature, negative_mask=negative_mask)
    return mean * len(queries)


def hard_text_loss(images: Tensor, texts: Tensor, present: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of an image's own text among changed ones, summed over the images.

    Args:
        images: [n, D] of unit length.
        texts: [n, 1 + K, D] of unit length, the true one first.
        present: [n, 1 + K] bool, whether a text exists; an image without a changed text is left out.
        temperature: divides the similarities.

    Returns:
        Scalar; 0 if no image has a changed text.
    """
    usable = present[:, 0] & present[:, 1:].any(1)
    if not bool(usable.any()):
        return (images.sum() + texts.sum()) * 0
    logits = torch.einsum("nd,nkd->nk", images[usable], texts[usable]) / temperature
    logits = logits.masked_fill(~present[usable], float("-inf"))
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum")
