"""A prompt computed once for all of its continuations: one packed sequence instead of a padded row for each.

The sequence is `[prompt | continuation | ... | prompt | continuation | ...]` without padding. Continuations see their
own prompt and themselves, and go on counting positions from their prompt's last one, so every token's state is what it
would be in a row of its own, for P + G C tokens instead of G (P + C).

Attention does not build the [N, N] mask of such a sequence. Tokens are moved into two padded blocks, prompts [B, P] and
continuations [K, C]: prompts attend causally, continuations to their prompt's keys and their own. That is as much
arithmetic as rows of their own would spend on the continuations alone, on every device that has scaled dot-product
attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from afmrl_ray.models.inner import inner_model
from afmrl_ray.models.listing import Row, collate, continuation

NAME = "afmrl_shared_prefix_sdpa"


@dataclass(frozen=True)
class Segments:
    """Who sees whom in a packed sequence of N tokens; travels in the place of an attention mask.

    Attributes:
        prompts: (B, P) prompts, and tokens of the longest.
        continuations: (K, C) continuations, and tokens of the longest.
        slots: [N] place of every token in the blocks, prompts' [B * P] first, then continuations' [K * C].
        owner: [K] prompt of each continuation.
        keep: [K, 1, C, P + C] bool, which keys a continuation's token sees: of its prompt, then its own.
    """

    prompts: tuple[int, int]
    continuations: tuple[int, int]
    slots: Tensor
    owner: Tensor
    keep: Tensor

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
    """Rows to distinct places among zeros. Its gradient is a plain gather, since no place is taken twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(slots)
        return rows.new_zeros(places, *rows.shape[1:]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots), None, None


class _Gather(torch.autograd.Function):
    """Rows from distinct places; the transpose of `_Scatter`."""

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
        inputs: keyword arguments of the backbone's inner model, a batch of one.
        mask: [K, C] True at the tokens of each continuation, counted from its start; K in the order of the prompts.
        tokens: [K, C] their ids, 0 elsewhere.
        places: [K, C] where they stand in the sequence, 0 elsewhere.
        before: [K, C] where the token before each stands: the prompt's last one for the first.
    """

    inputs: dict[str, Any]
    mask: Tensor
    tokens: Tensor
    places: Tensor
    before: Tensor

    def __len__(self) -> int:
        return self.inputs["input_ids"].shape[1]


def pack(
    prompts: Sequence[Row],
    continuations: Sequence[Sequence[np.ndarray]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Packed:
    """Put prompts and their continuations into one sequence; each prompt's pictures are in it once.

    Args:
        prompts: B prompts.
        continuations: of each prompt, at least one, each [n] token ids, n at least 1.
        pad_id: of the tokenizer; the sequence itself has no padding.
        device: of the tensors.
    """
    sizes = [[len(tokens) for tokens in own] for own in continuations]
    owner = np.repeat(np.arange(len(prompts)), [len(own) for own in sizes])
    longest_prompt, count, longest = max(map(len, prompts)), len(owner), max(max(own) for own in sizes)
    mask = np.zeros((count, longest), dtype=bool)
    tokens, places, before = (np.zeros((count, longest), dtype=np.int64) for _ in range(3))
    pieces: list[Row] = []
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
    # A continuation's padding sees what its tokens see, so that no row of the softmax is empty.
    seen = np.arange(longest_prompt) < prompt_lengths[owner][:, None, None]
    keep = np.concatenate(
        [
            np.broadcast_to(seen, (count, longest, longest_prompt)),
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
        keep=tensor(keep)[:, None],
    )
    inputs: dict[str, Any] = collate([Row.joined(pieces)], pad_id, device)
    inputs["attention_mask"] = {"full_attention": segments}
    return Packed(inputs, tensor(mask), tensor(tokens), tensor(places), tensor(before))


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: by segments where they stand in the mask's place, else the stock one.

    Args:
        module: the attention layer.
        query: [1, heads, N, dim].
        key: [1, key-value heads, N, dim].
        value: [1, key-value heads, N, dim].
        attention_mask: `Segments`, or anything that transformers' `sdpa` takes.
        options: `dropout`, `scaling`, and what else `sdpa` takes.

    Returns:
        [1, N, heads, dim], and none for the weights.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

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
        attn_mask=attention_mask.keep,
    )
    return attention_mask.out_of_blocks(prompts, continuations)[None], None


def use_shared_prefix(model: Any) -> None:
    """Let a Qwen2-VL or Qwen2.5-VL model take packed sequences beside ordinary ones.

    Raises:
        ValueError: the model has layers of sliding-window attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = inner_model(model).model.language_model.config
    if set(config.layer_types) != {"full_attention"}:
        raise ValueError("a shared prefix needs full attention in every layer; set use_sliding_window to false")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
