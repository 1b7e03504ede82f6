"""The GRPO learner: one optimizer step per batch of rollouts, computed in micro-batches, under a DeepSpeed engine."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from torch import Tensor
from torch import distributed as dist

from afmrl_ray import storage
from afmrl_ray.config.rar import RARConfig
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
from afmrl_ray.rar.rllib_contract import EngineLearner, start_learner_group
from afmrl_ray.rar.weights import trained_tensors, weights_fingerprint
from afmrl_ray.training.engine import Engine

_SAME_LOGPROB = 1e-4
"""Largest mean difference per token, nats, of two equivalent ways to compute a log-probability in float32."""

log = logging.getLogger(__name__)


def build_learners(rar: RARConfig, policy: PolicySpec) -> LearnerGroup:
    """Start the learner group; the caller shuts it down."""
    return start_learner_group(rar, policy, GRPOLearner)


@dataclass(frozen=True)
class Microbatch:
    """Consecutive rows of a learner's batch.

    Attributes:
        rows: the rows.
        counts: False for a repeat with weight 0, which gives this learner as many micro-batches as the others have.
    """

    rows: slice
    counts: bool = True

    def of(self, columns: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Its rows of all columns, on a device."""
        part = {name: value[self.rows].to(device) for name, value in columns.items()}
        return part if self.counts else {**part, WEIGHT: torch.zeros_like(part[WEIGHT])}


class GRPOLearner(EngineLearner):
    """Trains on its shard of a batch. Micro-batches and learners only split sums of the step, never change them."""

    def build(self) -> None:
        """Load the models and make the engine."""
        rar: RARConfig = self.config.rar
        torch.set_num_threads(torch_threads(rar.cpus_per_learner))
        super().build()
        self._bf16 = self.config.policy.generator.dtype == "bfloat16"
        self._policy: AttributePolicy = self._module[DEFAULT_MODULE_ID]
        self._engine = Engine(self._policy, rar.optimizer, steps=rar.steps, zero_stage=rar.zero_stage, bf16=self._bf16)
        self._version = 0
        self._prompt_sharing_checked = rar.shared_prompt == "off"

    def train_step(self, columns: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """One update; see `rar.prompts.batch_columns` for the columns.

        Returns:
            This learner's share of the loss, and `actor/*` metrics of all learners.
        """
        rar: RARConfig = self.config.rar
        if not self._prompt_sharing_checked:
            self._policy.shared_prompt = self._prompt_can_be_shared(columns)
            self._prompt_sharing_checked = True
        microbatches = self._microbatches(columns)
        if rar.grpo.kl_in_reward and rar.kl_coef > 0:
            columns = {**columns, **self._advantages_less_kl(columns, microbatches)}
        total = torch.zeros((), device=self._engine.device)
        sums: dict[str, Tensor] = {}
        for microbatch in microbatches:
            batch = microbatch.of(columns, self._engine.device)
            loss, stats = microbatch_loss(rar, batch, self._engine(batch))
            self._engine.backward(loss * dist.get_world_size(), last=microbatch is microbatches[-1])
            total += loss.detach()
            for name, value in stats.items():
                combine = torch.maximum if name.endswith("_max") else torch.add
                sums[name] = combine(sums[name], value) if name in sums else value
        metrics = {
            **self._engine.step(),
            **_over_learners(sums),
            "microbatches": float(len(microbatches)),
            "shared_prompt": float(self._policy.shared_prompt),
        }
        self._version += 1
        self._policy.forget_prompts()
        return total, {f"actor/{name}": value for name, value in metrics.items()}

    def _microbatches(self, columns: dict[str, Tensor]) -> list[Microbatch]:
        """Micro-batches within the token budget, equally many on every learner."""
        rows, budget = columns[ROW].tolist(), self.config.rar.tokens_per_microbatch
        prefixes = [len(prompt) for prompt in self._policy.prompts(rows)]
        lengths = columns[MASK].sum(1).tolist()
        if self._policy.shared_prompt:
            cuts = cut_shared_prefix(rows, prefixes, lengths, budget)
        else:
            # In order, so that the completions of a prompt stay together.
            parts = cut_by_tokens([p + n for p, n in zip(prefixes, lengths, strict=True)], budget, in_order=True)
            cuts = [slice(part[0], part[-1] + 1) for part in parts]
        most = torch.tensor(len(cuts), device=self._engine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        repeats = int(most) - len(cuts)
        return [Microbatch(cut) for cut in cuts] + [Microbatch(slice(0, 1), counts=False) for _ in range(repeats)]

    def _advantages_less_kl(self, columns: dict[str, Tensor], microbatches: list[Microbatch]) -> dict[str, Tensor]:
        """Advantages of the rewards minus the KL, and the log-probabilities of the reference that the KL needs."""
        rar: RARConfig = self.config.rar
        found = []
        for microbatch in microbatches:
            batch = microbatch.of(columns, self._engine.device)
            with torch.no_grad():
                ref_logp = self._engine({**batch, ONLY_REFERENCE: True})[REF_LOGP].cpu()
            if microbatch.counts:
                found.append(ref_logp)
        ref_logp = torch.cat(found)
        rewards = rewards_less_kl(
            columns[REWARD], columns[OLD_LOGP], ref_logp, columns[MASK], kl_coef=rar.kl_coef, kl=rar.grpo.kl
        ).to(self._engine.device)
        # A standard deviation may be that of the whole step, whose groups are split evenly over the learners.
        gathered = [torch.empty_like(rewards) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rewards)
        advantages = group_advantages(
            torch.cat(gathered).reshape(-1, rar.group_size),
            scale=rar.reward_scaling,
            eps=rar.advantage_eps,
            baseline=rar.grpo.baseline,
        )
        own = advantages.reshape(-1).chunk(dist.get_world_size())[dist.get_rank()].cpu()
        return {ADVANTAGE: own, REF_LOGP: ref_logp}

    def _prompt_can_be_shared(self, columns: dict[str, Tensor]) -> bool:
        """Whether packed and separate rows give the first group the same log-probabilities, on every learner.

        Raises:
            RuntimeError: they differ, and `shared_prompt` is `on`.
        """
        rar: RARConfig = self.config.rar
        rows = columns[ROW]
        group = {name: value[rows == rows[0]].to(self._engine.device) for name, value in columns.items()}
        counted = group[MASK].bool()
        found = []
        for shared in (False, True):
            self._policy.shared_prompt = shared
            with torch.no_grad():
                found.append(self._engine(group)[LOGP][counted])
        difference = (found[0] - found[1]).abs().mean()
        dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        # In bfloat16 two exact ways differ by rounding, as sampler and learner do.
        if difference <= (rar.rollout_logprob_diff_limit if self._bf16 else _SAME_LOGPROB):
            return True
        message = (
            f"log-probabilities with a shared prompt differ by {float(difference):.2g} nats per token from those of "
            "separate rows"
        )
        if rar.shared_prompt == "on":
            raise RuntimeError(f"{message}; set rar.shared_prompt to off, and report the model's configuration")
        log.warning("%s; going on with separate rows (rar.shared_prompt auto)", message)
        return False

    def save_engine(self, path: str) -> None:
        """Write this learner's shard of weights and optimizer below `path`."""
        with tempfile.TemporaryDirectory() as local:
            self._engine.save(local)
            storage.copy_dir(local, path)

    def load_engine(self, path: str, version: int) -> None:
        """Load what `save_engine` wrote after update number `version`."""
        with tempfile.TemporaryDirectory() as local:
            storage.copy_dir(path, local)
            remedy = f"remove {storage.parent(path)} to go on from the checkpoint before it"
            self._engine.load(local, location=path, remedy=remedy)
        self._version = version

    def export_weights(self) -> tuple[int, str, list[Any]] | None:
        """Version, fingerprint and a reference to the trained tensors; from the first learner only."""
        with self._engine.whole_parameters():
            if dist.get_rank() != 0:
                return None
            tensors = {name: tensor.cpu().clone() for name, tensor in trained_tensors(self._policy.policy).items()}
        return self._version, weights_fingerprint(tensors), [ray.put(tensors)]

    def save_model(self, path: str) -> None:
        """Write the policy as an ordinary checkpoint or adapter, from the first learner."""
        with self._engine.whole_parameters(), tempfile.TemporaryDirectory() as local:
            if dist.get_rank() == 0:
                save_trained(self._policy.policy.backbone, local, processor=self.config.policy.start)
                storage.copy_dir(local, path)


def microbatch_loss(
    rar: RARConfig, batch: dict[str, Tensor], outputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of a micro-batch: sums over its tokens, over denominators of the whole step.

    Args:
        rar: settings.
        batch: columns of B completions.
        outputs: outputs of the policy module for them.
    """
    counted = batch[MASK].bool() & (batch[WEIGHT] > 0)[:, None]
    logp, sampler_logp = outputs[LOGP], batch[OLD_LOGP]
    stale = rar.max_staleness > 0
    importance = importance_weights(logp, sampler_logp, cap=rar.tis_cap) if stale else None
    loss, stats = grpo_loss(
        logp,
        logp.detach() if stale else sampler_logp,
        outputs.get(REF_LOGP),
        batch[ADVANTAGE],
        counted,
        epsilon=rar.epsilon,
        epsilon_high=rar.epsilon_high,
        kl_coef=0.0 if rar.grpo.kl_in_reward else rar.kl_coef,
        denominator=batch[DENOMINATOR][0],
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

    stats |= {"loss": loss.detach(), "rollout_logprob_diff": mean((logp.detach() - sampler_logp).abs())}
    if importance is not None:
        capped = (importance >= rar.tis_cap).float()
        stats |= {"tis_weight": mean(importance), "tis_capped_fraction": mean(capped)}
    return loss, stats


def _over_learners(sums: dict[str, Tensor]) -> dict[str, float]:
    """Statistics of all learners: sums add up, `*_max` are maxima."""
    for name, value in sums.items():
        dist.all_reduce(value, op=dist.ReduceOp.MAX if name.endswith("_max") else dist.ReduceOp.SUM)
    return {name: float(value) for name, value in sums.items()}
