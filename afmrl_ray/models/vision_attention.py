"""Attention of the vision tower, batched over images with equal numbers of patches.

Each image (or window of one) attends to itself only. Without flash attention transformers loops over them in Python
and launches one small kernel for each in every layer; here images with equally many patches are one batch. It is
registered as an attention function of transformers, whose name must contain "flash" for it to receive the boundaries of
the images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "afmrl_flash_layout_sdpa"


def attention_by_length(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each segment of a packed sequence.

    Args:
        module: the layer; not used.
        query: [1, heads, L, dim].
        key: [1, heads, L, dim].
        value: [1, heads, L, dim].
        attention_mask: must be none.
        scaling: of the inner products.
        cu_seq_lens_q: [segments + 1] boundaries.
        max_length_q: of the longest segment.
        dropout: of the attention weights.

    Returns:
        [1, L, heads, dim], and none for the weights.
    """
    assert attention_mask is None, "attention within a segment is full"
    count, total = len(cu_seq_lens_q) - 1, query.shape[2]

    def attend(*packed: Tensor, length: int) -> Tensor:
        """[heads, n * length, dim] each, to [n * length, heads, dim]."""
        heads, _, dim = packed[0].shape
        q, k, v = (part.reshape(heads, -1, length, dim).transpose(0, 1) for part in packed)
        out = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).reshape(-1, heads, dim)

    if count * max_length_q == total:
        return attend(query[0], key[0], value[0], length=max_length_q)[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    starts = cu_seq_lens_q[:-1].tolist()
    indices, pieces = [], []
    for length in sorted(set(lengths) - {0}):
        own = [torch.arange(start, start + length) for start, n in zip(starts, lengths, strict=True) if n == length]
        index = torch.cat(own).to(query.device)
        indices.append(index)
        pieces.append(attend(query[0][:, index], key[0][:, index], value[0][:, index], length=length))
    order = torch.cat(indices).argsort()
    return torch.cat(pieces)[order][None], None


def use_attention_by_length(model: Any) -> None:
    """Use `attention_by_length` in the vision tower of a Qwen2-VL or Qwen2.5-VL model.

    A tower that already uses a kernel for packed sequences (flash attention) is left unchanged.
    """
    from transformers import AttentionInterface

    config = model.model.visual.config
    if "flash" in (config._attn_implementation or ""):
        return
    AttentionInterface.register(NAME, attention_by_length)
    config._attn_implementation = NAME
