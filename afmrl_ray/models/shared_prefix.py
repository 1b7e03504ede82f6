"""A prompt computed once for all of its continuations: one packed sequence instead of a padded row for each.

The sequence is `[prompt | continuation | ... | prompt | continuation | ...]` without padding. Continuations attend to
their own prompt and to themselves, and their positions continue their prompt's, so every token's state equals that in a
separate row, for P + G C tokens instead of G (P + C).

Attention does not build the [N, N] mask of such a sequence. Tokens are moved into two padded blocks, prompts [B, P] and
continuations [K, C]: prompts attend causally, continuations to their prompt's keys and their own. That costs as much
arithmetic as separate rows spend on the continuations alone, on every device that has scaled dot-product attention.

On CUDA a fused kernel is expected for both: flash attention for the prompts in 16 bits, whose only mask is causality;
for the continuations the memory-efficient kernel (or cuDNN's), since flash attention takes no mask. Their mask
[K, 1, C, P + C] is the largest tensor of its kind: it is broadcast over heads without a copy, and none of these kernels
materialises attention weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from afmrl_ray.models.model_input import ModelInput, collate, continuation
from afmrl_ray.models.unwrap import unwrap_model

NAME = "afmrl_shared_prefix_sdpa"


@dataclass(frozen=True)
class Segments:
    """Which tokens of a packed sequence of N attend to which; passed to the layers in place of an attention mask.

    Attributes:
        prompts: (B, P) number of prompts, and tokens of the longest.
        continuations: (K, C) number of continuations, and tokens of the longest.
        slots: [N] index of every token in the blocks, prompts' [B * P] first, then continuations' [K * C].
        owner: [K] prompt of each continuation.
        mask: [K, 1, C, P + C] bool, keys that a continuation's token attends to: of its prompt, then its own.
    """

    prompts: tuple[int, int]
    continuations: tuple[int, int]
    slots: Tensor
    owner: Tensor
    mask: Tensor

    def into_blocks(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """[N, heads, dim] to [B, heads, P, dim] and [K, heads, C, dim], zeros at padding."""
        (b, p), (k, c) = self.prompts, self.continuations
        blocks = _Scatter.apply(packed, self.slots, b * p + k * c)
        first, second = blocks.split([b * p, k * c])
        return first.unflatten(0, (b, p)).transpose(1, 2), second.unflatten(0, (k, c)).transpose(1, 2)

    def out_of_blocks(self, prompts: Tensor, continuations: Tensor) -> Tensor:
        """The inverse of `into_blocks`."""
        blocks = torch.cat([block.transpose(1, 2).flatten(0, 1) for block in (prompts, continuations)])
        return _Gather.apply(blocks, self.slots)


class _Scatter(torch.autograd.Function):
    """Rows to distinct indices among zeros. The gradient is a plain gather, since no index occurs twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(slots)
        return rows.new_zeros(places, *rows.shape[1:]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots), None, None


class _Gather(torch.autograd.Function):
    """Rows from distinct indices; the transpose of `_Scatter`."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.places = len(blocks)
        return blocks.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.places, *gradient.shape[1:]).index_copy_(0, slots, gradient), None


@dataclass(frozen=True)
class Packed:
    """Prompts and their continuations as one sequence of N tokens.

    Attributes:
        inputs: keyword arguments of the backbone's `model`, a batch of one.
        mask: [K, C] True at the tokens of each continuation, counted from its start; K in the order of the prompts.
        tokens: [K, C] their ids, 0 elsewhere.
        places: [K, C] their indices in the sequence, 0 elsewhere.
        before: [K, C] index of the token before each: for the first one, the prompt's last token.
    """

    inputs: dict[str, Any]
    mask: Tensor
    tokens: Tensor
    places: Tensor
    before: Tensor

    def __len__(self) -> int:
        return self.inputs["input_ids"].shape[1]


def pack(
    prompts: Sequence[ModelInput],
    continuations: Sequence[Sequence[np.ndarray]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Packed:
    """Put prompts and their continuations into one sequence; each prompt's images are in it once.

    Args:
        prompts: B prompts.
        continuations: of each prompt, at least one, each [n] token ids, n at least 1.
        pad_id: padding token, which the sequence itself does not contain.
        device: of the tensors.
    """
    sizes = [[len(tokens) for tokens in own] for own in continuations]
    owner = np.repeat(np.arange(len(prompts)), [len(own) for own in sizes])
    longest_prompt, count, longest = max(map(len, prompts)), len(owner), max(max(own) for own in sizes)
    mask = np.zeros((count, longest), dtype=bool)
    tokens, places, before = (np.zeros((count, longest), dtype=np.int64) for _ in range(3))
    pieces: list[ModelInput] = []
    slots: list[np.ndarray] = []
    start = k = 0
    for b, (prompt, own) in enumerate(zip(prompts, continuations, strict=True)):
        pieces.append(prompt)
        slots.append(b * longest_prompt + np.arange(len(prompt)))
        start += len(prompt)
        last = start - 1
        for ids in own:
            pieces.append(continuation(prompt, ids))
            slots.append(len(prompts) * longest_prompt + k * longest + np.arange(len(ids)))
            mask[k, : len(ids)], tokens[k, : len(ids)] = True, ids
            places[k, : len(ids)] = start + np.arange(len(ids))
            before[k, : len(ids)] = np.append(last, places[k, : len(ids) - 1])
            start += len(ids)
            k += 1
    prompt_lengths = np.array([len(prompt) for prompt in prompts])
    # A continuation's padding attends to the prompt too, so that no row of the softmax is empty.
    of_prompt = np.arange(longest_prompt) < prompt_lengths[owner][:, None, None]
    attended = np.concatenate(
        [
            np.broadcast_to(of_prompt, (count, longest, longest_prompt)),
            np.broadcast_to(np.tri(longest, dtype=bool), (count, longest, longest)),
        ],
        axis=-1,
    )

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    segments = Segments(
        prompts=(len(prompts), longest_prompt),
        continuations=(count, longest),
        slots=tensor(np.concatenate(slots)),
        owner=tensor(owner),
        mask=tensor(attended)[:, None],
    )
    inputs: dict[str, Any] = collate([ModelInput.joined(pieces)], pad_id, device)
    inputs["attention_mask"] = {"full_attention": segments}
    return Packed(inputs, tensor(mask), tensor(tokens), tensor(places), tensor(before))


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers that handles `Segments` and `Decoding`; else the stock one is called.

    Args:
        module: the attention layer.
        query: [1, heads, N, dim].
        key: [1, key-value heads, N, dim].
        value: [1, key-value heads, N, dim].
        attention_mask: `Segments`, `Decoding`, or anything that transformers' `sdpa` takes.
        options: `dropout`, `scaling`, and other options of `sdpa`.

    Returns:
        [1, N, heads, dim], and none for the weights.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if isinstance(attention_mask, Decoding):
        return attention_mask.attend(module.layer_idx, query, key, value, options.get("scaling")), None
    if not isinstance(attention_mask, Segments):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    (q, own_q), (k, own_k), (v, own_v) = (
        attention_mask.into_blocks(part[0].transpose(0, 1)) for part in (query, key, value)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        return scaled_dot_product_attention(
            q,
            repeat_kv(k, groups),
            repeat_kv(v, groups),
            dropout_p=options.get("dropout", 0.0),
            scale=options.get("scaling"),
            **how,
        )

    owner = attention_mask.owner
    prompts = attend(q, k, v, is_causal=True)
    continuations = attend(
        own_q,
        torch.cat([k.index_select(0, owner), own_k], dim=2),
        torch.cat([v.index_select(0, owner), own_v], dim=2),
        attn_mask=attention_mask.mask,
    )
    return attention_mask.out_of_blocks(prompts, continuations)[None], None


class Decoding:
    """Keys and values for decoding G continuations of each of B prompts; passed in place of an attention mask.

    A prompt's keys and values are held once, and all its continuations are multiplied with them together; a cache
    repeated for each of them takes G times the memory and memory traffic.

    Args:
        cache: transformers' cache after the prompts' forward pass.
        prompt_mask: [B, P] 1 at the prompts' tokens.
        group_size: G.
        longest: tokens of the longest continuation.
    """

    def __init__(self, cache: Any, prompt_mask: Tensor, *, group_size: int, longest: int) -> None:
        self._prompts = [(layer.keys, layer.values) for layer in cache.layers]
        keys = self._prompts[0][0]
        self._batch, self._group = len(prompt_mask), group_size
        shape = (self._batch * group_size, keys.shape[1], longest, keys.shape[3])
        self._own = [(keys.new_empty(shape), keys.new_empty(shape)) for _ in self._prompts]
        self._hidden = (prompt_mask == 0)[:, None, None, :]
        self.tokens = 0
        """Tokens that every continuation has so far; the caller increments it."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of the next token of every continuation.

        Args:
            layer: number of the layer.
            query: [B * G, heads, 1, dim].
            key: [B * G, key-value heads, 1, dim].
            value: [B * G, key-value heads, 1, dim].
            scale: of the inner products.

        Returns:
            [B * G, 1, heads, dim].
        """
        batch, heads, _, dim = query.shape
        kv = key.shape[1]
        (prompt_keys, prompt_values), (keys, values) = self._prompts[layer], self._own[layer]
        keys[:, :, self.tokens], values[:, :, self.tokens] = key[:, :, 0], value[:, :, 0]
        keys, values = keys[:, :, : self.tokens + 1], values[:, :, : self.tokens + 1]
        # Heads that share keys are adjacent: [B * G, kv, heads / kv, dim].
        query = query.view(batch, kv, heads // kv, dim) * (dim**-0.5 if scale is None else scale)
        together = query.unflatten(0, (self._batch, self._group)).transpose(1, 2).flatten(2, 3)
        prompt_scores = (together @ prompt_keys.mT).masked_fill(self._hidden, -torch.inf)
        apart = prompt_scores.unflatten(2, (self._group, -1)).transpose(1, 2).flatten(0, 1)
        scores = torch.cat([apart, query @ keys.mT], dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        on_prompt, on_own = scores.split([apart.shape[-1], self.tokens + 1], dim=-1)
        together = on_prompt.unflatten(0, (self._batch, self._group)).transpose(1, 2).flatten(2, 3) @ prompt_values
        out = together.unflatten(2, (self._group, -1)).transpose(1, 2).flatten(0, 1) + on_own @ values
        return out.reshape(batch, 1, heads, dim)


def takes_shared_prefix(model: Any) -> bool:
    """Whether `use_shared_prefix` was applied to a model."""
    return unwrap_model(model).model.language_model.config._attn_implementation == NAME


def use_shared_prefix(model: Any) -> None:
    """Make a Qwen2-VL or Qwen2.5-VL model accept packed sequences beside ordinary ones.

    Raises:
        ValueError: the model has layers of sliding-window attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = unwrap_model(model).model.language_model.config
    if set(config.layer_types) != {"full_attention"}:
        raise ValueError("a shared prefix needs full attention in every layer; set use_sliding_window to false")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
