"""The GRPO learner: updates on mini-batches of rollouts, computed in micro-batches, under a DeepSpeed engine."""

from __future__ import annotations

import logging
import tempfile
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
from afmrl_ray.rar.gradient_cosine import cosine
from afmrl_ray.rar.learner_rows import Microbatch, select_rows
from afmrl_ray.rar.loss import group_advantages, kl_factor, rewards_less_kl
from afmrl_ray.rar.microbatch_loss import microbatch_loss
from afmrl_ray.rar.module import (
    ADVANTAGE,
    GROUP,
    LEARNER_LOGP,
    LOGP,
    MASK,
    OLD_LOGP,
    ONLY_REFERENCE,
    REF_LOGP,
    REWARD,
    ROW,
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


class GRPOLearner(EngineLearner):
    """Trains on its shard of a batch. Micro-batches and learners only split sums of the step, never change them."""

    def build(self) -> None:
        """Load the models and make the engine."""
        rar: RARConfig = self.config.rar
        torch.set_num_threads(torch_threads(rar.cpus_per_learner))
        super().build()
        self._bf16 = self.config.policy.generator.dtype == "bfloat16"
        self._policy: AttributePolicy = self._module[DEFAULT_MODULE_ID]
        self._engine = Engine(
            self._policy,
            rar.optimizer,
            steps=rar.steps * rar.updates_per_batch,
            zero_stage=rar.zero_stage,
            bf16=self._bf16,
        )
        self._version = 0
        self._prompt_sharing_checked = rar.shared_prompt == "off"

    def train_step(self, columns: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """The updates of a batch of rollouts; see `rar.prompts.batch_columns` for the columns.

        Returns:
            This learner's share of the loss, and `actor/*` metrics of all learners, means over the updates.
        """
        rar: RARConfig = self.config.rar
        if not self._prompt_sharing_checked:
            self._policy.shared_prompt = self._prompt_can_be_shared(columns)
            self._prompt_sharing_checked = True
        if rar.grpo.kl_in_reward and rar.kl_coef > 0:
            columns = {**columns, **self._advantages_less_kl(columns, self._microbatches(columns))}
        elif not bool((columns[WEIGHT] > 0).all()):
            columns = select_rows(columns, columns[WEIGHT] > 0)
        metrics = self._gradient_cosine(columns) if _is_due(rar.gradient_cosine_every, self._version) else {}
        if rar.old_is_learner and rar.updates_per_batch > 1:
            columns = {**columns, **self._before_updates(columns)}
        minibatches = [
            select_rows(columns, columns[GROUP] % rar.minibatches == part) for part in range(rar.minibatches)
        ]
        self._policy.entropy = "none"
        if _is_due(rar.grpo.entropy_every, self._version):
            self._policy.entropy = "value"
        if rar.grpo.entropy_coef:
            self._policy.entropy = "gradient"
        updates = [self._update_on(minibatch) for _ in range(rar.passes_per_batch) for minibatch in minibatches]
        self._policy.entropy = "none"
        for name in updates[0]:
            values = [update[name] for update in updates]
            metrics[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
        # Later updates differ from the sampler because the policy has moved.
        metrics["rollout_logprob_diff"] = updates[0]["rollout_logprob_diff"]
        metrics["learning_rate"] = updates[-1]["learning_rate"]
        metrics["shared_prompt"] = float(self._policy.shared_prompt)
        self._version += 1
        self._policy.forget_prompts()
        return torch.tensor(metrics["loss"]), {f"actor/{name}": value for name, value in metrics.items()}

    @property
    def _kl_coef(self) -> float:
        """Coefficient of the KL at this step."""
        rar: RARConfig = self.config.rar
        progress = self._version / max(1, rar.steps - 1)
        return rar.kl_coef * kl_factor(rar.grpo.kl_schedule, min(1.0, progress), final=rar.grpo.kl_final_fraction)

    def _update_on(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """One optimizer update on a mini-batch; metrics of all learners."""
        rar: RARConfig = self.config.rar
        microbatches = self._microbatches(columns)
        sums: dict[str, Tensor] = {}
        for microbatch in microbatches:
            batch = microbatch.of(columns, self._engine.device)
            loss, stats = microbatch_loss(
                rar,
                batch,
                self._engine(batch),
                kl_coef=0.0 if rar.grpo.kl_in_reward else self._kl_coef,
                entropy_coef=rar.grpo.entropy_coef,
            )
            self._engine.backward(loss * dist.get_world_size(), last=microbatch is microbatches[-1])
            for name, value in stats.items():
                combine = torch.maximum if name.endswith("_max") else torch.add
                sums[name] = combine(sums[name], value) if name in sums else value
        return {
            **self._engine.step(),
            **_over_learners(sums),
            "kl_coef": self._kl_coef,
            "microbatches": float(len(microbatches)),
        }

    def _before_updates(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log-probabilities before the first update, those of the reference too, which need no other pass then."""
        found: dict[str, list[Tensor]] = {LOGP: [], REF_LOGP: []}
        for microbatch in self._microbatches(columns):
            with torch.no_grad():
                outputs = self._engine(microbatch.of(columns, self._engine.device))
            if microbatch.counts:
                for name, values in found.items():
                    values += [outputs[name].cpu()] if name in outputs else []
        return {{LOGP: LEARNER_LOGP}.get(name, name): torch.cat(values) for name, values in found.items() if values}

    def _gradient_cosine(self, columns: dict[str, Tensor]) -> dict[str, float]:
        """Cosine of the policy loss' gradients of even and odd groups, over all learners.

        The module is called beside the engine, whose backward pass would add to the gradients of the update.
        """
        rar: RARConfig = self.config.rar
        parameters = self._engine.parameters
        halves = []
        for half in (0, 1):
            total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
            own = select_rows(columns, columns[GROUP] % 2 == half)
            for microbatch in self._microbatches(own):
                batch = microbatch.of(own, self._engine.device)
                loss, _ = microbatch_loss(rar, batch, self._policy(batch), kl_coef=0.0, entropy_coef=0.0)
                for added, gradient in zip(
                    total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
                ):
                    if gradient is not None:
                        added += gradient
            for gradient in total:
                dist.all_reduce(gradient)
            halves.append(total)
        return {"gradient_cosine": cosine(*halves)}

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
            columns[REWARD],
            columns[OLD_LOGP],
            ref_logp,
            columns[MASK],
            kl_coef=self._kl_coef,
            kl=rar.grpo.kl,
            kl_clamp=rar.grpo.kl_clamp,
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


def _over_learners(sums: dict[str, Tensor]) -> dict[str, float]:
    """Statistics of all learners: sums add up, `*_max` are maxima."""
    for name, value in sums.items():
        dist.all_reduce(value, op=dist.ReduceOp.MAX if name.endswith("_max") else dist.ReduceOp.SUM)
    return {name: float(value) for name, value in sums.items()}


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
