"""GRPO on RLlib's learner stack, with a DeepSpeed engine inside the learner.

RLlib gives the learner group (N learners, process group, placement, sharding of batches); the engine owns gradients and
optimizer, because RLlib knows neither gradient accumulation nor ZeRO.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from torch import Tensor
from torch import distributed as dist

from afmrl_ray import storage
from afmrl_ray.config.train import RARConfig
from afmrl_ray.models.adapters import save_trained
from afmrl_ray.models.microbatches import cut_by_tokens, cut_shared_prefix
from afmrl_ray.models.threads import torch_threads
from afmrl_ray.rar.loss import group_advantages, grpo_loss, importance_weights, rewards_less_kl
from afmrl_ray.rar.module import (
    ADVANTAGE,
    DENOMINATOR,
    LOGP,
    MASK,
    OLD_LOGP,
    ONLY_REFERENCE,
    REF_LOGP,
    REWARD,
    ROW,
    TOKENS,
    WEIGHT,
    AttributePolicy,
    PolicySpec,
)  # fmt: skip
from afmrl_ray.rar.weights import trained_tensors, weights_fingerprint
from afmrl_ray.training.engine import Engine

# RLlib insists on spaces; a language model has none.
_OBSERVATIONS = gym.spaces.Box(-1, 1, (1,), np.float32)
_ACTIONS: gym.Space = gym.spaces.Discrete(2)

_SAME_LOGPROB = 1e-4
"""Mean gap per token up to which two ways of computing a log-probability in float32 count as equal."""

log = logging.getLogger(__name__)


class LearnerConfig(AlgorithmConfig):
    """What RLlib's learner group needs to know; `rar` and `policy` ride along as plain data."""

    def __init__(self, rar: RARConfig, policy: PolicySpec) -> None:
        super().__init__()
        self.rar = rar
        self.policy = policy
        self.environment(observation_space=_OBSERVATIONS, action_space=_ACTIONS)
        self.learners(
            num_learners=rar.num_learners,
            num_cpus_per_learner=rar.cpus_per_learner,
            num_gpus_per_learner=rar.gpus_per_learner,
        )

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=AttributePolicy, model_config={"policy": self.policy})

    def get_default_learner_class(self) -> type[TorchLearner]:
        return GRPOLearner


def build_learners(rar: RARConfig, policy: PolicySpec) -> LearnerGroup:
    """Start the learner group; the caller shuts it down in `finally`."""
    config = LearnerConfig(rar, policy)
    spec = config.get_multi_rl_module_spec(spaces={DEFAULT_MODULE_ID: (_OBSERVATIONS, _ACTIONS)})
    return LearnerGroup(config=config, module_spec=spec)


def learner_batch(columns: dict[str, np.ndarray]) -> MultiAgentBatch:
    """Columns aligned by completion as RLlib's batch; learners get contiguous, equal shares of it."""
    rows = len(columns[ROW])
    return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(columns)}, env_steps=rows)


class GRPOLearner(TorchLearner):
    """One optimizer step per update, cut into micro-batches of `tokens_per_microbatch`; the cut changes nothing."""

    def build(self) -> None:
        torch.set_num_threads(torch_threads(self.config.rar.cpus_per_learner))
        super().build()

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """The engine owns the optimizer."""

    def _make_modules_ddp_if_necessary(self) -> None:
        rar: RARConfig = self.config.rar
        _join_process_group()
        self._own: AttributePolicy = self._module[DEFAULT_MODULE_ID]
        self._engine = Engine(
            self._own,
            rar.optimizer,
            steps=rar.steps,
            zero_stage=rar.zero_stage,
            bf16=self.config.policy.generator.dtype == "bfloat16",
        )
        self._version = 0
        self._checked = rar.shared_prompt == "off"
        self._kl_in_reward = rar.grpo.kl_in_reward and rar.kl_coef > 0
        self.stats: dict[str, float] = {}

    def _update(self, batch: dict[str, Any], **_: Any) -> tuple[Any, Any, Any]:
        columns = {name: torch.as_tensor(value) for name, value in batch[DEFAULT_MODULE_ID].items()}
        if not self._checked:
            self._own.shared_prompt = self._prompt_can_be_shared(columns)
            self._checked = True
        parts = self._microbatches(columns)
        if self._kl_in_reward:
            self._take_kl_off_rewards(columns, parts)
        loss = torch.zeros((), device=self._engine.device)
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            part_loss, stats = self._part_loss({name: value[part] for name, value in columns.items()}, index)
            self._engine.backward(part_loss * dist.get_world_size(), last=index + 1 == len(parts))
            loss += part_loss.detach()
            for name, value in stats.items():
                joined = torch.maximum if name.endswith("_max") else torch.add
                sums[name] = joined(sums[name], value) if name in sums else value
        self.stats = {
            **self._across_learners(sums),
            **self._engine.step(),
            "microbatches": float(len(parts)),
            "shared_prompt": float(self._own.shared_prompt),
        }
        self._version += 1
        self._own.forget_prompts()
        return {}, {DEFAULT_MODULE_ID: loss}, {}

    def _take_kl_off_rewards(self, columns: dict[str, Tensor], parts: list[slice]) -> None:
        """Replace the advantages by those of rewards less the KL, and keep the reference's log-probabilities."""
        rar: RARConfig = self.config.rar
        found = []
        for part in parts:
            asked = {name: value[part].to(self._engine.device) for name, value in columns.items()}
            with torch.no_grad():
                found.append(self._engine({**asked, ONLY_REFERENCE: True})[REF_LOGP].cpu())
        columns[REF_LOGP] = torch.cat(found[: self._real_parts])
        own = rewards_less_kl(
            columns[REWARD], columns[OLD_LOGP], columns[REF_LOGP], columns[MASK], kl_coef=rar.kl_coef, kl=rar.grpo.kl
        ).to(self._engine.device)
        # A deviation may be that of the whole step, whose groups are shared out evenly.
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        advantages = group_advantages(
            torch.cat(everyone).reshape(-1, rar.group_size),
            scale=rar.scale_rewards,
            eps=rar.advantage_eps,
            baseline=rar.grpo.baseline,
        )
        columns[ADVANTAGE] = advantages.reshape(-1).chunk(dist.get_world_size())[dist.get_rank()].cpu()

    def _part_loss(self, part: dict[str, Tensor], index: int) -> tuple[Tensor, dict[str, Tensor]]:
        part = {name: value.to(self._engine.device) for name, value in part.items()}
        if index >= self._real_parts:
            # A micro-batch that only keeps learners in step counts for nothing.
            part[WEIGHT] = torch.zeros_like(part[WEIGHT])
        loss = self.compute_loss_for_module(
            module_id=DEFAULT_MODULE_ID, config=self.config, batch=part, fwd_out=self._engine(part)
        )
        return loss, self._part_stats

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Tensor], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        """This micro-batch's part of the step's loss: a sum over tokens, over the denominator of the whole step."""
        rar: RARConfig = config.rar
        counted = batch[MASK].bool() & (batch[WEIGHT] > 0)[:, None]
        denominator = batch[DENOMINATOR][0]
        logp, sampler_logp = fwd_out[LOGP], batch[OLD_LOGP]
        stale = rar.max_staleness > 0
        importance = importance_weights(logp, sampler_logp, cap=rar.tis_cap) if stale else None
        loss, stats = grpo_loss(
            logp,
            logp.detach() if stale else sampler_logp,
            fwd_out.get(REF_LOGP),
            batch[ADVANTAGE],
            counted,
            epsilon=rar.epsilon,
            epsilon_high=rar.epsilon_high,
            kl_coef=0.0 if self._kl_in_reward else rar.kl_coef,
            denominator=denominator,
            weights=batch[WEIGHT],
            importance_sampling_level=rar.grpo.importance_sampling_level,
            delta=rar.grpo.delta,
            dual_clip=rar.grpo.dual_clip,
            kl=rar.grpo.kl,
            kl_times_ratio=rar.grpo.kl_times_ratio,
            importance=importance,
        )

        def mean(values: Tensor) -> Tensor:
            return torch.where(counted, values, 0.0).sum() / batch[TOKENS][0]

        self._part_stats = {
            **stats,
            "loss": loss.detach(),
            "rollout_logprob_diff": mean((logp.detach() - sampler_logp).abs()),
        }
        if importance is not None:
            self._part_stats["importance"] = mean(importance)
            self._part_stats["importance_capped"] = mean((importance >= rar.tis_cap).float())
        return loss

    def _microbatches(self, columns: dict[str, Tensor]) -> list[slice]:
        """Consecutive rows whose size stays within the token budget; the same count on every learner."""
        rows, budget = columns[ROW].tolist(), self.config.rar.tokens_per_microbatch
        prefixes = [len(prompt) for prompt in self._own.prompts(rows)]
        lengths = columns[MASK].sum(1).tolist()
        if self._own.shared_prompt:
            parts = cut_shared_prefix(rows, prefixes, lengths, budget)
        else:
            # In order, so that the completions of a prompt stay together.
            cut = cut_by_tokens([p + n for p, n in zip(prefixes, lengths, strict=True)], budget, in_order=True)
            parts = [slice(part[0], part[-1] + 1) for part in cut]
        self._real_parts = len(parts)
        most = torch.tensor(len(parts), device=self._engine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return parts + [slice(0, 1)] * (int(most) - len(parts))

    def _prompt_can_be_shared(self, columns: dict[str, Tensor]) -> bool:
        """Whether the first group's log-probabilities are the same packed and in rows of their own, on every learner.

        Raises:
            RuntimeError: they are not, and `shared_prompt` is `on`.
        """
        rar: RARConfig = self.config.rar
        rows = columns[ROW]
        group = {name: value[rows == rows[0]].to(self._engine.device) for name, value in columns.items()}
        counted = group[MASK].bool()
        found = []
        for shared in (False, True):
            self._own.shared_prompt = shared
            with torch.no_grad():
                found.append(self._engine(group)[LOGP][counted])
        gap = (found[0] - found[1]).abs().mean()
        dist.all_reduce(gap, op=dist.ReduceOp.MAX)
        # In bfloat16 two exact ways differ by rounding, as sampler and learner do.
        limit = rar.rollout_logprob_diff_limit if self.config.policy.generator.dtype == "bfloat16" else _SAME_LOGPROB
        if gap <= limit:
            return True
        told = (
            f"log-probabilities of a shared prompt differ by {float(gap):.2g} nats per token from those of plain rows"
        )
        if rar.shared_prompt == "on":
            raise RuntimeError(f"{told}; set rar.shared_prompt to off, and report the model's configuration")
        log.warning("%s; going on with plain rows (rar.shared_prompt auto)", told)
        return False

    def _across_learners(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Sums over denominators add up over learners; maxima are maxima."""
        for name, value in sums.items():
            op = dist.ReduceOp.MAX if name.endswith("_max") else dist.ReduceOp.SUM
            dist.all_reduce(value, op=op)
        return {name: float(value) for name, value in sums.items()}

    def apply_gradients(self, gradients_dict: Any) -> None:
        """The engine applied them."""

    def _get_optimizer_state(self) -> dict[str, Any]:
        return {}

    def _set_optimizer_state(self, state: Any) -> None:
        """The engine's own checkpoints hold it."""

    def save_engine(self, path: str) -> None:
        """Write this learner's share of weights and optimizer below `path`."""
        with tempfile.TemporaryDirectory() as local:
            self._engine.save(local)
            storage.copy_dir(local, path)

    def load_engine(self, path: str, version: int) -> None:
        """Read what `save_engine` wrote after update number `version`."""
        with tempfile.TemporaryDirectory() as local:
            storage.copy_dir(path, local)
            remedy = f"remove {storage.parent(path)} to go on from the checkpoint before it"
            self._engine.load(local, location=path, remedy=remedy)
        self._version = version

    def export_weights(self) -> tuple[int, str, list[Any]] | None:
        """Version, fingerprint and a reference to the trained tensors; from the first learner, none from the others."""
        with self._engine.whole_parameters():
            if dist.get_rank() != 0:
                return None
            tensors = {name: tensor.cpu().clone() for name, tensor in trained_tensors(self._own.policy).items()}
        return self._version, weights_fingerprint(tensors), [ray.put(tensors)]

    def save_model(self, path: str) -> None:
        """Write the policy as an ordinary checkpoint or adapter, from the first learner."""
        with self._engine.whole_parameters(), tempfile.TemporaryDirectory() as local:
            if dist.get_rank() == 0:
                save_trained(self._own.policy.backbone, local, processor=self.config.policy.start)
                storage.copy_dir(local, path)


def _join_process_group() -> None:
    """RLlib makes no process group for a single learner, and sets no ranks for several."""
    if not dist.is_initialized():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    # Each learner sees only its own GPU, so its local rank is 0.
    os.environ.update(LOCAL_RANK="0", RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
