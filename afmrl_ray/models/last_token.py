"""The last decoder layer computed for the last token only, which is all that last-token pooling needs.

Keys and values are computed for all tokens; queries, output projection and feed-forward part, most of the layer's work,
for the last one. The layer itself is transformers' own, called as in decoding: with the last token and a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb


class _Cache:
    """Keys and values of the tokens before the last, with the interface of transformers' cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)


@contextmanager
def last_token_only(text_model: Any) -> Iterator[None]:
    """Inside the context, a Qwen2-VL language model returns the hidden state of the last token only, [B, 1, D]."""
    layer = text_model.layers[-1]
    whole, patched = layer.forward, layer.__dict__.get("forward")

    def forward(
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: None,
        **kwargs: Any,
    ) -> Tensor:
        assert past_key_values is None, "no cache: the sequence starts at its first token"
        before, last = hidden_states[:, :-1], hidden_states[:, -1:]
        keys, values = _keys_and_values(layer, before, *(part[:, :-1] for part in position_embeddings))
        return whole(
            last,
            attention_mask=attention_mask[:, :, -1:] if attention_mask is not None else None,
            position_embeddings=tuple(part[:, -1:] for part in position_embeddings),
            past_key_values=_Cache(keys, values),
            **kwargs,
        )

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if patched is not None:
            layer.forward = patched


def _keys_and_values(layer: Any, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's keys and values, [B, heads, L, dim] each."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    keys, values = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.k_proj, attention.v_proj)
    )
    return apply_rotary_pos_emb(keys, keys, cos, sin)[0], values
