"""What samples inside a rollout actor: plain code behind one interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Protocol

import ray
import torch

from afmrl_ray.config.train import RolloutConfig
from afmrl_ray.errors import ConfigError, WeightSyncError
from afmrl_ray.models.generation import generate
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.models.shared_prefix import use_shared_prefix
from afmrl_ray.rar.messages import PromptGroup, Weights
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.weights import load_tensors, trained_tensors, weights_fingerprint


class RolloutEngine(Protocol):
    """What a rollout actor is made of."""

    def set_weights(self, weights: Weights) -> tuple[int, str]:
        """Take pushed weights; returns the version and the fingerprint of what the engine now holds."""

    def sample(self, rows: Sequence[int], seeds: Sequence[int], *, group_size: int, version: int) -> list[PromptGroup]:
        """Sample a group for each row; a group is a function of weights, row and seed.

        Raises:
            WeightSyncError: the engine is not at `version`.
        """


MakeEngine = Callable[[PolicySpec, RolloutConfig, int], RolloutEngine]
"""A class whose instances are engines, called with the policy, `rar.rollout` and torch's threads."""


def engine_class(config: RolloutConfig) -> MakeEngine:
    """What `rar.rollout.engine` names; vLLM is imported only where it is chosen.

    Raises:
        ConfigError: vLLM is chosen and not installed.
    """
    if config.engine == "transformers":
        return TransformersEngine
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rar.rollout.engine is vllm, which is not installed; pip install .[vllm], or set "
            "rar.rollout.engine=transformers"
        )
    from afmrl_ray.rar.vllm_engine import VLLMEngine

    return VLLMEngine


class TransformersEngine:
    """Sampling by `models.generation`: a prompt computed once per group, each group with its own random numbers.

    Args:
        spec: the policy.
        config: `rar.rollout`.
        threads: of torch.
    """

    def __init__(self, spec: PolicySpec, config: RolloutConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._spec = spec
        self._policy = spec.load_policy().eval().to(device)
        use_shared_prefix(self._policy.backbone)
        self._processor = spec.load_processor()
        self._catalogue = spec.catalogue.open()
        self._version = -1

    def set_weights(self, weights: Weights) -> tuple[int, str]:
        load_tensors(self._policy, ray.get(weights.reference[0]))
        self._version = weights.version
        return self._version, weights_fingerprint(trained_tensors(self._policy))

    def sample(self, rows: Sequence[int], seeds: Sequence[int], *, group_size: int, version: int) -> list[PromptGroup]:
        if version != self._version:
            raise WeightSyncError(f"asked for rollouts of version {version}, the worker holds {self._version}")
        prompts = [generator_input(self._processor, self._catalogue, row, config=self._spec.generator) for row in rows]
        out = generate(
            self._policy.backbone,
            self._processor,
            prompts,
            max_new_tokens=self._spec.generator.max_new_tokens,
            group_size=group_size,
            seeds=seeds,
            temperature=self._spec.temperature,
        )
        texts = out.texts(self._processor)
        groups = []
        for index, row in enumerate(rows):
            own = slice(index * group_size, (index + 1) * group_size)
            ids, mask, logp = (tensor[own].cpu().numpy() for tensor in (out.ids, out.mask, out.logp))
            groups.append(PromptGroup(row, version, ids, mask, logp, texts[own]))
        return groups
