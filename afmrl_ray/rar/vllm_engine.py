"""Sampling with vLLM (0.30 and later); imported only when `rar.rollout.engine` is `vllm`."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from afmrl_ray.config.rar import RolloutConfig
from afmrl_ray.errors import WeightSyncError
from afmrl_ray.models.backbones import fetch
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.rar.messages import PromptGroup, Weights
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.vllm_requests import completion_seeds, groups_of, prompt_of, sampling_options
from afmrl_ray.rar.vllm_weights import Trained, write_adapter
from afmrl_ray.rar.weights import check_fit, weights_fingerprint

log = logging.getLogger(__name__)


def engine_options(spec: PolicySpec, config: RolloutConfig, trained: Trained) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`: the generator's longest sequence, its image budget, and `rar.rollout.vllm`."""
    options: dict[str, Any] = {
        "model": fetch(trained.base),
        "dtype": spec.generator.dtype,
        "max_model_len": spec.generator.max_prompt_tokens + spec.generator.max_new_tokens,
        "mm_processor_kwargs": spec.generator.image.model_dump(),
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        # Log-probabilities of the distribution that is sampled: at the temperature, without the forbidden tokens.
        "logprobs_mode": "processed_logprobs",
        **config.vllm.model_dump(),
    }
    if config.vllm.tensor_parallel_size > 1:
        # The actor already has its GPUs; with its Ray backend, vLLM would request more.
        options["distributed_executor_backend"] = "mp"
    if trained.lora is None:
        options["worker_extension_cls"] = "afmrl_ray.rar.vllm_worker.TrainedTensors"
    else:
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": trained.max_rank()}
    return options


class VLLMEngine:
    """Sampling with vLLM: one request and seed per completion; the prefix cache holds the prompt of a group.

    A completion is a function of weights, prompt and seed only up to rounding, which depends on the other requests of
    the batch. Repeated attribute names are not forbidden, whatever `generator.unique_names` says: vLLM's interface for
    that depends on its version. Log-probabilities do not depend on that mask in any engine.

    Args:
        spec: the policy.
        config: `rar.rollout`.
        threads: number of torch threads.
    """

    def __init__(self, spec: PolicySpec, config: RolloutConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self._spec = spec
        if spec.generator.unique_names:
            log.warning(
                "rar.rollout.engine vllm samples without generator.unique_names: it may repeat names, which is invalid"
            )
        self._processor = spec.load_processor()
        self._catalogue = spec.catalogue.open()
        self._trained = Trained.of(spec)
        self._llm = LLM(**engine_options(spec, config, self._trained))
        self._adapter: LoRARequest | None = None
        self._pushes = 0
        self._version = -1

    def set_weights(self, weights: Weights) -> tuple[int, str]:
        tensors = ray.get(weights.reference[0])
        check_fit(self._trained.tensors, tensors)
        # No version until everything is loaded, so that nothing is sampled from partly loaded weights.
        self._version = -1
        self._pushes += 1
        held = self._load(tensors) if self._trained.lora is None else self._adapt(tensors)
        if not self._llm.reset_prefix_cache():
            raise WeightSyncError("vLLM did not reset its prefix cache, which holds keys and values of older weights")
        self._version = weights.version
        return self._version, held

    def _load(self, tensors: dict[str, torch.Tensor]) -> str:
        """Load full weights through a file, since vLLM's workers are separate processes; returns their fingerprint."""
        with tempfile.TemporaryDirectory(prefix="afmrl-weights-") as folder:
            path = str(Path(folder) / "trained.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            held = set(self._llm.collective_rpc("load_trained_tensors", args=(path,)))
        if len(held) != 1:
            raise WeightSyncError(f"vLLM's workers hold {len(held)} different weights")
        # If the vision tower is trained, its cached outputs are stale too.
        self._llm.llm_engine.reset_encoder_cache()
        return held.pop()

    def _adapt(self, tensors: dict[str, torch.Tensor]) -> str:
        """Load LoRA weights as a new adapter, since vLLM never reloads an adapter id; returns their fingerprint."""
        folder = Path(tempfile.mkdtemp(prefix="afmrl-adapter-"))
        write_adapter(folder / "adapter", self._trained.lora, tensors)
        adapter = LoRARequest(f"push-{self._pushes}", self._pushes, str(folder / "adapter"))
        self._llm.llm_engine.add_lora(adapter)
        if self._pushes not in self._llm.llm_engine.list_loras():
            raise WeightSyncError(f"vLLM did not take the adapter in {folder}")
        if self._adapter is not None:
            shutil.rmtree(Path(self._adapter.lora_path).parent)
        self._adapter = adapter
        return weights_fingerprint(tensors)

    def sample(
        self, rows: Sequence[int], seeds: Sequence[int] | None, *, group_size: int, version: int
    ) -> list[PromptGroup]:
        if version != self._version:
            raise WeightSyncError(f"asked for rollouts of version {version}, the worker holds {self._version}")
        prompts = [generator_input(self._processor, self._catalogue, row, config=self._spec.generator) for row in rows]
        greedy: list[int | None] = [None] * len(rows)
        each_seed = greedy if seeds is None else [one for seed in seeds for one in completion_seeds(seed, group_size)]
        requests = [prompt_of(prompt, self._processor.merge_size) for prompt in prompts]
        outputs = self._llm.generate(
            [prompt for prompt in requests for _ in range(group_size)],
            [self._sampling(seed) for seed in each_seed],
            lora_request=self._adapter,
            use_tqdm=False,
        )
        return groups_of(rows, prompts, outputs, self._processor, group_size=group_size, version=version)

    def _sampling(self, seed: int | None) -> SamplingParams:
        return SamplingParams(
            **sampling_options(
                self._processor,
                seed=seed,
                max_new_tokens=self._spec.generator.max_new_tokens,
                temperature=self._spec.temperature,
            )
        )
