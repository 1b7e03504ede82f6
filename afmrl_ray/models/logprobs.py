"""Log-probabilities of given completions, as distillation, the RL policy and its reference model compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afmrl_ray.models.model_input import ModelInput, append_completion, collate
from afmrl_ray.models.shared_prefix import Packed
from afmrl_ray.models.unwrap import unwrap_model

Entropy = Literal["none", "value", "gradient"]

_CHUNK = 1024
"""Tokens per call of the language-model head."""


class CompletionLogprobs(nn.Module):
    """A generator as a module whose forward pass returns log-probabilities of completions.

    Args:
        backbone: a (PEFT-wrapped) `Qwen2_5_VLForConditionalGeneration`.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        batch: dict[str, Tensor] | Packed,
        mask: Tensor,
        *,
        forbidden_ids: Sequence[int] = (),
        temperature: float = 1.0,
        entropy: Entropy = "none",
    ) -> Tensor:
        """[B, C] float32 log-probabilities, see `completion_logprobs` and `packed_logprobs`; with `entropy` [2, B, C].

        Args:
            batch: prompts with their completions, padded or packed.
            mask: [B, C] from `completion_batch`, or the packed sequence's own.
            forbidden_ids: see `token_logprobs`.
            temperature: see `token_logprobs`.
            entropy: see `selected_logprobs`.
        """
        options: dict[str, Any] = {"forbidden_ids": forbidden_ids, "temperature": temperature, "entropy": entropy}
        if isinstance(batch, Packed):
            return packed_logprobs(self.backbone, batch, **options)
        return completion_logprobs(self.backbone, batch, mask, **options)


def token_logprobs(logits: Tensor, *, temperature: float, forbidden_ids: Sequence[int]) -> Tensor:
    """Log-probabilities as both sampler and learner define them: float32, at a temperature, without forbidden tokens.

    Args:
        logits: [..., V].
        temperature: divides the logits.
        forbidden_ids: tokens with probability 0.

    Returns:
        [..., V] float32.
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
        pad_id: padding token.
        device: of the tensors.

    Returns:
        The batch of `collate`, and [B, C] bool: True at the tokens of each completion, counted from its start.
    """
    sequences = [append_completion(prompt, tokens) for prompt, tokens in zip(prompts, completions, strict=True)]
    lengths = torch.tensor([len(tokens) for tokens in completions], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    return collate(sequences, pad_id, device), mask


def completion_logprobs(
    model: Any,
    batch: dict[str, Tensor],
    mask: Tensor,
    *,
    forbidden_ids: Sequence[int],
    temperature: float = 1.0,
    entropy: Entropy = "none",
) -> Tensor:
    """Log-probabilities of the completion tokens; only their positions go through the language-model head.

    Args:
        model: a (PEFT-wrapped) `Qwen2_5_VLForConditionalGeneration`.
        batch: from `completion_batch`; completions end in the last column.
        mask: [B, C] from `completion_batch`.
        forbidden_ids: see `token_logprobs`.
        temperature: see `token_logprobs`.
        entropy: see `selected_logprobs`.

    Returns:
        [B, C] float32, 0 where the mask is False; with `entropy` [2, B, C], the second the entropies.
    """
    backbone = unwrap_model(model)
    hidden = backbone.model(**batch, use_cache=False).last_hidden_state
    longest = mask.shape[1]
    # With left padding all rows end in the last column: token c of a completion of length n is at longest - n + c.
    shift = longest - mask.sum(1, keepdim=True)
    column = (torch.arange(longest, device=mask.device) + shift).clamp(max=longest - 1)
    states = hidden[:, -longest - 1 : -1].gather(1, column[..., None].expand(-1, -1, hidden.shape[-1]))
    targets = batch["input_ids"][:, -longest:].gather(1, column)
    return _scattered_logprobs(backbone.lm_head, states[mask], targets[mask], mask, forbidden_ids, temperature, entropy)


def packed_logprobs(
    model: Any,
    packed: Packed,
    *,
    forbidden_ids: Sequence[int],
    temperature: float = 1.0,
    entropy: Entropy = "none",
) -> Tensor:
    """As `completion_logprobs`, for a packed sequence.

    Args:
        model: see `completion_logprobs`; `models.shared_prefix.use_shared_prefix` must have been applied to it.
        packed: from `models.shared_prefix.pack`.
        forbidden_ids: see `token_logprobs`.
        temperature: see `token_logprobs`.
        entropy: see `selected_logprobs`.

    Returns:
        [K, C] float32, 0 where `packed.mask` is False; with `entropy` [2, K, C].
    """
    backbone = unwrap_model(model)
    hidden = backbone.model(**packed.inputs, use_cache=False).last_hidden_state[0]
    states = hidden[packed.before[packed.mask]]
    return _scattered_logprobs(
        backbone.lm_head, states, packed.tokens[packed.mask], packed.mask, forbidden_ids, temperature, entropy
    )


def _scattered_logprobs(
    head: Any,
    states: Tensor,
    targets: Tensor,
    mask: Tensor,
    forbidden_ids: Sequence[int],
    temperature: float,
    entropy: Entropy,
) -> Tensor:
    """`selected_logprobs` of `targets` [T] after `states` [T, D], written where `mask` is True; 0 elsewhere."""
    found = selected_logprobs(
        head, states, targets, forbidden_ids=forbidden_ids, temperature=temperature, entropy=entropy
    )
    out = torch.zeros((*found.shape[:-1], *mask.shape), dtype=torch.float32, device=mask.device)
    out[..., mask] = found
    return out


def selected_logprobs(
    head: Any,
    states: Tensor,
    targets: Tensor,
    *,
    forbidden_ids: Sequence[int],
    temperature: float,
    entropy: Entropy = "none",
) -> Tensor:
    """Log-probabilities of given tokens, computed in chunks.

    Logits [T, V] are never held at once, neither in the forward nor in the backward pass: with a published vocabulary
    they would take most of the memory of a step.

    Args:
        head: the language-model head.
        states: [T, D].
        targets: [T] token ids.
        forbidden_ids: tokens with probability 0.
        temperature: divides the logits.
        entropy: whether the entropy of each distribution is computed too, in nats: `none`, `value`, or `gradient` =
            with its gradient.

    Returns:
        [T] float32; with `entropy` [2, T], log-probabilities and entropies.
    """

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        logp = token_logprobs(head(states), temperature=temperature, forbidden_ids=forbidden_ids)
        chosen = logp.gather(-1, targets[:, None])[:, 0]
        if entropy == "none":
            return chosen
        every = logp if entropy == "gradient" else logp.detach()
        # A forbidden token adds 0, not 0 times minus infinity.
        return torch.stack([chosen, -(every.exp() * every.masked_fill(every.isinf(), 0.0)).sum(-1)])

    if len(states) <= _CHUNK:
        return of_chunk(states, targets)
    chunks = zip(states.split(_CHUNK), targets.split(_CHUNK), strict=True)
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks], dim=-1)
