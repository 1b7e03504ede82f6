"""Attention of the vision tower over images of equal size at once.

Each image (or window of one) attends to itself alone. Without flash attention transformers loops over them in Python,
one small kernel for each in every layer; images with as many patches are a batch instead. It is registered as an
attention function of transformers, whose name must contain "flash" to be handed the boundaries of the images.
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
    assert attention_mask is None, "segments see all of themselves"
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
    places, pieces = [], []
    for length in sorted(set(lengths) - {0}):
        own = [torch.arange(start, start + length) for start, n in zip(starts, lengths, strict=True) if n == length]
        place = torch.cat(own).to(query.device)
        places.append(place)
        pieces.append(attend(query[0][:, place], key[0][:, place], value[0][:, place], length=length))
    order = torch.cat(places).argsort()
    return torch.cat(pieces)[order][None], None


def use_attention_by_length(model: Any) -> None:
    """Let the vision tower of a Qwen2-VL or Qwen2.5-VL model attend by `attention_by_length`, unless it has a kernel of
    its own for packed sequences."""
    from transformers import AttentionInterface

    config = model.model.visual.config
    if "flash" in (config._attn_implementation or ""):
        return
    AttentionInterface.register(NAME, attention_by_length)
    config._attn_implementation = NAME
