"""Rollout engines: the plain code inside a rollout actor, behind one interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Protocol

import ray
import torch

from afmrl_ray.config.rar import RolloutConfig
from afmrl_ray.errors import ConfigError, WeightSyncError
from afmrl_ray.models.generation import generate
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.models.shared_prefix import use_shared_prefix
from afmrl_ray.rar.messages import PromptGroup, Weights
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.weights import load_tensors, trained_tensors, weights_fingerprint


class RolloutEngine(Protocol):
    """Interface of the engines; a rollout actor is an instance of one."""

    def set_weights(self, weights: Weights) -> tuple[int, str]:
        """Load weights; returns version and fingerprint of what the engine now holds."""

    def sample(
        self, rows: Sequence[int], seeds: Sequence[int] | None, *, group_size: int, version: int
    ) -> list[PromptGroup]:
        """Sample one group per row; a group is a function of weights, row and seed.

        Without seeds, decode greedily; `group_size` must then be 1. Log-probabilities that engines return with greedy
        completions are not comparable.

        Raises:
            WeightSyncError: the engine holds another version of the weights.
        """


MakeEngine = Callable[[PolicySpec, RolloutConfig, int], RolloutEngine]
"""Class of an engine; its constructor takes the policy, `rar.rollout` and the number of torch threads."""


def engine_class(config: RolloutConfig) -> MakeEngine:
    """The class that `rar.rollout.engine` names; vLLM is imported only when it is chosen.

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
    """Sampling with `models.generation`: one prefill per group, and a random generator per group.

    Args:
        spec: the policy.
        config: `rar.rollout`.
        threads: number of torch threads.
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

    def sample(
        self, rows: Sequence[int], seeds: Sequence[int] | None, *, group_size: int, version: int
    ) -> list[PromptGroup]:
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
            unique_names=self._spec.generator.unique_names,
        )
        texts = out.texts(self._processor)
        groups = []
        for index, row in enumerate(rows):
            own = slice(index * group_size, (index + 1) * group_size)
            ids, mask, logp = (tensor[own].cpu().numpy() for tensor in (out.ids, out.mask, out.logp))
            groups.append(PromptGroup(row, version, ids, mask, logp, texts[own]))
        return groups
