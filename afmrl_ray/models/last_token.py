"""The last decoder layer where only the last token's output is wanted: keys and values of all tokens, the rest of one.

Its queries, output projection and feed-forward part, most of a layer, are skipped for all tokens but the last. The
layer itself is transformers' own: it is called as in decoding, with the last token and the keys and values before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb


class _Before:
    """Keys and values of the tokens before the last, in the place of a cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)


@contextmanager
def last_token_only(text_model: Any) -> Iterator[None]:
    """Inside, the forward pass of a Qwen2-VL language model gives the last token's hidden state alone, [B, 1, D]."""
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
        assert past_key_values is None, "there is nothing before the first token"
        before, last = hidden_states[:, :-1], hidden_states[:, -1:]
        keys, values = _keys_and_values(layer, before, *(part[:, :-1] for part in position_embeddings))
        return whole(
            last,
            attention_mask=attention_mask[:, :, -1:] if attention_mask is not None else None,
            position_embeddings=tuple(part[:, -1:] for part in position_embeddings),
            past_key_values=_Before(keys, values),
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
    """[B, heads, L, dim] each, as the layer makes them."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_states)
    keys, values = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.k_proj, attention.v_proj)
    )
    return apply_rotary_pos_emb(keys, keys, cos, sin)[0], values
