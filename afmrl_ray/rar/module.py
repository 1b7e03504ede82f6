"""The policy as an RLlib module: the generator that is trained, and the frozen reference of the KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config.models import AdapterConfig, GeneratorConfig
from afmrl_ray.models.adapters import load_for_training, load_trained
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import CompletionLogprobs, Entropy, completion_batch
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.models.shared_prefix import pack, use_shared_prefix

ROW, GROUP, COMPLETION, MASK, OLD_LOGP, ADVANTAGE, REWARD, WEIGHT, DENOMINATOR, TOKENS = (
    "row", "group", "completion", "mask", "old_logp", "advantage", "reward", "weight", "denominator", "tokens"
)  # fmt: skip
"""Columns of a learner's batch, one row per completion; it holds catalogue rows, never images."""
LEARNER_LOGP = "learner_logp"
"""Column that the learner adds: log-probabilities of its policy before the first update of the batch."""
LOGP, REF_LOGP, ENTROPY = "logp", "ref_logp", "entropy"
"""Outputs of the module."""
ONLY_REFERENCE = "only_reference"
"""Key of a batch that asks for the reference's log-probabilities alone."""


@dataclass(frozen=True)
class PolicySpec:
    """The policy as plain data, for learners and rollout workers alike.

    Attributes:
        start: checkpoint of the generator at the round's start; also the reference of the KL.
        generator: prompt, image budget and limits.
        adapter: which weights are trained.
        catalogue: catalogue of the items.
        temperature: sampling temperature, at which log-probabilities are computed.
        with_reference: whether the learner holds the frozen reference.
        seed: seed of a new adapter's initial weights.
    """

    start: str
    generator: GeneratorConfig
    adapter: AdapterConfig
    catalogue: CatalogueRef
    temperature: float
    with_reference: bool
    seed: int

    def load_policy(self) -> CompletionLogprobs:
        """The trainable policy as of the round's start."""
        return CompletionLogprobs(
            load_for_training(self.start, "generator", self.adapter, seed=self.seed, dtype=self.generator.dtype)
        )

    def load_reference(self) -> CompletionLogprobs:
        """A frozen copy of the policy as of the round's start, adapters of earlier rounds included."""
        reference = load_trained(self.start, "generator", dtype=self.generator.dtype)
        return CompletionLogprobs(reference.requires_grad_(False)).eval()

    def load_processor(self) -> ItemProcessor:
        return ItemProcessor.from_pretrained(self.start, self.generator.image)


class AttributePolicy(TorchRLModule):
    """CompletionLogprobs and reference of a `PolicySpec`, which is `model_config["policy"]`."""

    def setup(self) -> None:
        """Load the models; RLlib calls this instead of a constructor."""
        spec: PolicySpec = self.model_config["policy"]
        self.spec = spec
        self.policy = spec.load_policy()
        self.reference = spec.load_reference() if spec.with_reference else None
        self.processor = spec.load_processor()
        self.catalogue = spec.catalogue.open()
        for policy in filter(None, (self.policy, self.reference)):
            use_shared_prefix(policy.backbone)
        self.shared_prompt = False
        self.entropy: Entropy = "none"
        self._prompts: dict[int, ModelInput] = {}

    def train(self, mode: bool = True) -> AttributePolicy:
        """Stay in evaluation mode: with dropout, learner and sampler would compute different log-probabilities."""
        return super().train(False)

    def prompts(self, rows: Sequence[int]) -> list[ModelInput]:
        """The prompt of each row, cached until `forget_prompts`; completions of a group share one object."""
        for row in set(rows) - self._prompts.keys():
            self._prompts[row] = generator_input(self.processor, self.catalogue, row, config=self.spec.generator)
        return [self._prompts[row] for row in rows]

    def forget_prompts(self) -> None:
        """Empty the cache of `prompts`."""
        self._prompts.clear()

    def _forward_train(self, batch: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Log-probabilities of completions; with `shared_prompt`, consecutive rows with equal `row` share their prompt.

        Args:
            batch: columns `row` [B], `completion` [B, C], `mask` [B, C]; `ref_logp` [B, C] if already computed, and
                `only_reference` to leave `logp` out.

        Returns:
            `logp`, with a reference `ref_logp`, and `entropy` if the attribute `entropy` asks for it: [B, C] float32,
            0 where the mask is False.
        """
        kept = batch[MASK].bool()
        completions = [ids[keep].cpu().numpy() for ids, keep in zip(batch[COMPLETION], kept, strict=True)]
        device = next(self.policy.parameters()).device
        prompts = self.prompts(batch[ROW].tolist())
        inputs: Any
        if self.shared_prompt:
            groups = [list(group) for _, group in groupby(range(len(prompts)), key=lambda index: id(prompts[index]))]
            inputs = pack(
                [prompts[group[0]] for group in groups],
                [[completions[index] for index in group] for group in groups],
                self.processor.pad_id,
                device,
            )
            mask = inputs.mask
        else:
            inputs, mask = completion_batch(prompts, completions, self.processor.pad_id, device)
        options: dict[str, Any] = {
            "forbidden_ids": self.processor.forbidden_ids,
            "temperature": self.spec.temperature,
        }
        pad = (0, kept.shape[1] - mask.shape[1])
        out = {}
        if ONLY_REFERENCE not in batch:
            found = nn.functional.pad(self.policy(inputs, mask, entropy=self.entropy, **options), pad)
            if self.entropy == "none":
                out[LOGP] = found
            else:
                out[LOGP], out[ENTROPY] = found
        if REF_LOGP in batch:
            out[REF_LOGP] = batch[REF_LOGP]
        elif self.reference is not None:
            with torch.no_grad():
                out[REF_LOGP] = nn.functional.pad(self.reference(inputs, mask, **options), pad)
        return out
