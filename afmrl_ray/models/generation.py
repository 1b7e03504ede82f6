"""Sampling from the generator: each prompt is computed once per group, and each group has a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import token_logprobs
from afmrl_ray.models.model_input import ModelInput, collate
from afmrl_ray.models.shared_prefix import Decoding, takes_shared_prefix
from afmrl_ray.models.unique_names import UniqueNames
from afmrl_ray.models.unwrap import unwrap_model


@dataclass(frozen=True)
class Completions:
    """Sampled completions, groups in the order of the prompts.

    Attributes:
        ids: [B*G, C] token ids; padding after the end of turn.
        mask: [B*G, C] True at sampled tokens, the end of turn included.
        logp: [B*G, C] float32 log-probabilities at the sampling temperature; 0 at padding. Without the mask of
            `unique_names`, see `generate`.
    """

    ids: Tensor
    mask: Tensor
    logp: Tensor

    def texts(self, processor: ItemProcessor) -> list[tuple[str, bool]]:
        """Text of every completion, and whether it ended with the end of turn."""
        return [processor.decode(ids[mask].tolist()) for ids, mask in zip(self.ids, self.mask, strict=True)]


@torch.no_grad()
def generate(
    model: Any,
    processor: ItemProcessor,
    prompts: Sequence[ModelInput],
    *,
    max_new_tokens: int,
    group_size: int = 1,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    max_separators: int | None = None,
    unique_names: bool = False,
) -> Completions:
    """Sample `group_size` completions of every prompt, or decode greedily.

    The random numbers of a group depend on its own seed alone, not on the other prompts of the call. If
    `use_shared_prefix` was applied to the model, a prompt's keys and values are held once for its group.

    With `unique_names` a token is drawn among those that repeat no attribute name (`models.unique_names`), but its
    log-probability is recorded over all tokens, as the learner computes it without knowing the mask. Trainers treat
    truncated sampling (top-k, top-p) in the same way: sampler and learner agree, the ratio of a fresh rollout is 1, and
    the gradient is that of the unmasked policy on samples of the masked one. The two differ by what the mask removes,
    a few percent of the completions and nothing once the policy repeats no names.

    Args:
        model: a (PEFT-wrapped) `Qwen2_5_VLForConditionalGeneration`.
        processor: of its checkpoint.
        prompts: B prompts.
        max_new_tokens: length limit of a completion.
        group_size: G completions per prompt.
        seeds: one per prompt; none = greedy decoding (then `group_size` must be 1).
        temperature: divides the logits.
        max_separators: a completion also ends after this many separators of attribute pairs; none = no such limit.
        unique_names: whether tokens that would repeat an attribute name of their completion are forbidden.

    Raises:
        ValueError: `group_size` is above 1 without seeds.
    """
    if seeds is None and group_size != 1:
        raise ValueError("greedy decoding gives one completion per prompt; pass seeds to sample groups")
    backbone = unwrap_model(model)
    device = backbone.device
    batch = collate(prompts, processor.pad_id, device)
    noise = _noise(seeds, group_size, max_new_tokens, device) if seeds is not None else None

    out = backbone.model(**batch, use_cache=True)
    steps = _decoder(backbone, out.past_key_values, batch["attention_mask"], group_size, max_new_tokens)
    position = batch["position_ids"].amax(dim=(0, 2)).repeat_interleave(group_size)
    hidden = out.last_hidden_state[:, -1].repeat_interleave(group_size, dim=0)

    alive = torch.ones(len(hidden), dtype=torch.bool, device=device)
    if max_separators is not None:
        separators = torch.tensor(processor.separator_ids, device=device)
        left = torch.full((len(hidden),), max_separators, device=device)
    names = UniqueNames(processor.name_tokens, len(hidden)) if unique_names else None
    ids, masks, logps = [], [], []
    for step in range(max_new_tokens):
        logp = token_logprobs(backbone.lm_head(hidden), temperature=temperature, forbidden_ids=processor.forbidden_ids)
        allowed = logp if names is None else names.forbid(logp)
        token = allowed.argmax(-1) if noise is None else _draw(allowed, noise[:, step])
        token = torch.where(alive, token, processor.pad_id)
        ids.append(token)
        masks.append(alive)
        logps.append(torch.where(alive, logp.gather(-1, token[:, None])[:, 0], 0.0))
        alive = alive & (token != processor.end_id)
        if max_separators is not None:
            left = left - torch.isin(token, separators).long()
            alive = alive & (left > 0)
        if step + 1 == max_new_tokens or not alive.any():
            break
        if names is not None:
            names.write(token.tolist())
        position = position + 1
        hidden = steps(token, position)
    return Completions(torch.stack(ids, 1), torch.stack(masks, 1), torch.stack(logps, 1))


def _decoder(
    backbone: Any, cache: Any, prompt_mask: Tensor, group_size: int, longest: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from the next token of every completion [B*G] and its position [B*G] to hidden states [B*G, D]."""
    if group_size > 1 and takes_shared_prefix(backbone):
        decoding = Decoding(cache, prompt_mask, group_size=group_size, longest=longest)

        def shared(token: Tensor, position: Tensor) -> Tensor:
            out = backbone.model(
                input_ids=token[:, None],
                attention_mask={"full_attention": decoding},
                position_ids=position.expand(3, -1)[..., None],
                use_cache=False,
            )
            decoding.tokens += 1
            return out.last_hidden_state[:, -1]

        return shared
    if group_size > 1:
        cache.batch_repeat_interleave(group_size)
    mask = prompt_mask.repeat_interleave(group_size, dim=0)

    def repeated(token: Tensor, position: Tensor) -> Tensor:
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        out = backbone.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position.expand(3, -1)[..., None],
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, -1]

    return repeated


def _noise(seeds: Sequence[int], group_size: int, steps: int, device: torch.device) -> Tensor:
    draws = [
        torch.rand(group_size, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.cat(draws).to(device)


def _draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling: one token per row from its log-probabilities [B*G, V] and a uniform number [B*G]."""
    cumulative = logp.double().exp().cumsum(-1)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
