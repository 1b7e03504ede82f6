"""Sampling a group with its prompt computed once, against `generate(num_return_sequences=G)`.

The stock side is forced to draw our tokens, so that both sides do the same work and their log-probabilities can be
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2_5_VLForConditionalGeneration

from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.generation import Completions, generate
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import token_logprobs
from afmrl_ray.models.model_input import ModelInput, collate
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.models.shared_prefix import use_shared_prefix
from jobs.benchmarks.harness import Comparison, compare, seconds
from jobs.benchmarks.tiny import make_generator_bench

PROMPTS, GROUP, NEW_TOKENS = 4, 8, 32


class Draw(LogitsProcessor):
    """Forces the token that we drew, and records its log-probability."""

    def __init__(self, ids: Tensor, prompt: int, forbidden: Sequence[int]) -> None:
        self._ids, self._prompt, self._forbidden = ids, prompt, forbidden
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self._ids[:, input_ids.shape[1] - self._prompt, None]
        self.logp.append(token_logprobs(scores, temperature=1.0, forbidden_ids=self._forbidden).gather(1, wanted)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, wanted, 0.0)


def comparisons() -> list[Comparison]:
    """Time the sampling of `PROMPTS` groups.

    Raises:
        AssertionError: the log-probabilities of the drawn tokens differ.
    """
    bench = make_generator_bench(image=True, words=8, new_tokens=NEW_TOKENS)
    generator, catalogue = bench.config.generator, bench.reference.open()
    processor = ItemProcessor.from_pretrained(bench.checkpoint, generator.image)
    rows = [generator_input(processor, catalogue, row, config=generator) for row in range(PROMPTS)]
    model = load_backbone(bench.checkpoint, "generator").eval()
    use_shared_prefix(model)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(bench.checkpoint, attn_implementation="sdpa").eval()

    def ours() -> Completions:
        return generate(model, processor, rows, max_new_tokens=NEW_TOKENS, group_size=GROUP, seeds=list(range(PROMPTS)))

    drawn = ours()
    steps = drawn.ids.shape[1]

    def theirs() -> Draw:
        draw = Draw(drawn.ids, max(map(len, rows)), processor.forbidden_ids)
        stock.generate(**_inputs(rows, processor), **_settings(steps), logits_processor=LogitsProcessorList([draw]))
        return draw

    logp = torch.stack(theirs().logp, 1)
    gap = float((logp - drawn.logp)[drawn.mask].abs().max())
    assert gap < 1e-4, f"log-probabilities of the same tokens differ by {gap:g}"
    return [
        compare(
            f"rollout, {PROMPTS} prompts of {max(map(len, rows))} tokens, G {GROUP}, C {steps}",
            f"generate(num_return_sequences={GROUP})",
            seconds(ours),
            seconds(theirs),
            target=1.3,
            at_most=False,
            equality=f"log-probabilities of the same tokens equal within {gap:.0e}",
        )
    ]


def _inputs(rows: Sequence[ModelInput], processor: ItemProcessor) -> dict[str, Tensor]:
    return {name: value for name, value in collate(rows, processor.pad_id).items() if name != "position_ids"}


def _settings(steps: int) -> dict[str, Any]:
    return {
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "num_return_sequences": GROUP,
        "do_sample": True,
        "top_k": 0,
        "eos_token_id": None,
    }
