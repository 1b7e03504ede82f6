"""Log-probabilities of given completions, for distillation, the policy and its reference alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from afmrl_ray.models.inner import inner_model
from afmrl_ray.models.model_input import ModelInput, append_completion, collate
from afmrl_ray.models.shared_prefix import Packed

_CHUNK = 1024
"""Tokens that go through the language-model head at once."""


def token_logprobs(logits: Tensor, *, temperature: float, forbidden_ids: Sequence[int]) -> Tensor:
    """Log-probabilities that sampler and learner agree on: float32, tempered, special tokens excluded.

    Args:
        logits: [..., V].
    """
    logits = logits.float() / temperature
    if len(forbidden_ids):
        index = torch.tensor(forbidden_ids, device=logits.device)
        logits = logits.index_fill(-1, index, float("-inf"))
    return torch.log_softmax(logits, dim=-1)


def completion_batch(
    prompts: Sequence[ModelInput], completions: Sequence[np.ndarray], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], Tensor]:
    """Collate prompts followed by their completions.

    Args:
        prompts: B prompts.
        completions: B arrays of token ids, at least one token each.
        pad_id: of the tokenizer.
        device: of the tensors.

    Returns:
        The batch of `collate`, and [B, C] bool: True at the tokens of each completion, counted from its start.
    """
    rows = [append_completion(prompt, tokens) for prompt, tokens in zip(prompts, completions, strict=True)]
    lengths = torch.tensor([len(tokens) for tokens in completions], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    return collate(rows, pad_id, device), mask


def completion_logprobs(
    model: Any,
    batch: dict[str, Tensor],
    mask: Tensor,
    *,
    forbidden_ids: Sequence[int],
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities of the completion tokens; only their positions go through the language-model head.

    Args:
        batch: from `completion_batch`; completions end in the last column.
        mask: [B, C] from `completion_batch`.

    Returns:
        [B, C] float32, 0 where the mask is False.
    """
    backbone = inner_model(model)
    hidden = backbone.model(**batch, use_cache=False).last_hidden_state
    longest = mask.shape[1]
    # Rows end together (left padding), so column c of a completion of length n stands at longest - n + c.
    shift = longest - mask.sum(1, keepdim=True)
    column = (torch.arange(longest, device=mask.device) + shift).clamp(max=longest - 1)
    states = hidden[:, -longest - 1 : -1].gather(1, column[..., None].expand(-1, -1, hidden.shape[-1]))
    targets = batch["input_ids"][:, -longest:].gather(1, column)
    return _spread(backbone.lm_head, states[mask], targets[mask], mask, forbidden_ids, temperature)


def packed_logprobs(model: Any, packed: Packed, *, forbidden_ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """The same for a packed sequence.

    Args:
        packed: from `models.shared_prefix.pack`; the model must have been given to `use_shared_prefix`.

    Returns:
        [K, C] float32, 0 where `packed.mask` is False.
    """
    backbone = inner_model(model)
    hidden = backbone.model(**packed.inputs, use_cache=False).last_hidden_state[0]
    states = hidden[packed.before[packed.mask]]
    return _spread(backbone.lm_head, states, packed.tokens[packed.mask], packed.mask, forbidden_ids, temperature)


def _spread(
    head: Any, states: Tensor, targets: Tensor, mask: Tensor, forbidden_ids: Sequence[int], temperature: float
) -> Tensor:
    """Log-probabilities of `targets` [T] after `states` [T, D], at the True places of `mask`."""
    out = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    out[mask] = selected_logprobs(head, states, targets, forbidden_ids=forbidden_ids, temperature=temperature)
    return out


def selected_logprobs(
    head: Any, states: Tensor, targets: Tensor, *, forbidden_ids: Sequence[int], temperature: float
) -> Tensor:
    """Log-probabilities of given tokens. Logits [T, V] never exist at once, forward or backward: at the size of a real
    vocabulary they would be most of the memory of a step.

    Args:
        head: the language-model head.
        states: [T, D].
        targets: [T] token ids.
        forbidden_ids: tokens with probability 0.
        temperature: divides the logits.

    Returns:
        [T] float32.
    """

    def some(states: Tensor, targets: Tensor) -> Tensor:
        logp = token_logprobs(head(states), temperature=temperature, forbidden_ids=forbidden_ids)
        return logp.gather(-1, targets[:, None])[:, 0]

    if len(states) <= _CHUNK:
        return some(states, targets)
    chunks = zip(states.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return torch.cat([checkpoint(some, *chunk, use_reentrant=False) for chunk in chunks])
