"""A whole GRPO step, and its update alone, against TRL's GRPOTrainer.

Both sides have the same weights, prompts, images, reward and settings. Ours has a rollout actor, a learner actor and a
weight sync between them, as in training; TRL runs in this process. TRL's settings suit a CPU: float32, no gradient
checkpointing, all completions of a step in one batch.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import numpy as np
import ray
import torch

from afmrl_ray.config.models import AdapterConfig, OptimizerConfig
from afmrl_ray.config.rar import RARConfig
from afmrl_ray.models.shared_prefix import pack, use_shared_prefix
from afmrl_ray.rar.learner import build_learners
from afmrl_ray.rar.loss import group_advantages, grpo_loss
from afmrl_ray.rar.messages import Weights
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.prompts import batch_columns, group_seeds
from afmrl_ray.rar.rllib_contract import learner_batch
from afmrl_ray.rar.rollout import RolloutPool
from jobs.benchmarks.harness import Comparison, comparison
from jobs.benchmarks.tiny import make_generator_bench

PROMPTS, GROUP, KL, REPEATS = 4, 8, 0.04, 5


def reward(ids: Any) -> float:
    """Reward of a completion's token IDs: cheap, and the same on both sides."""
    return float(np.mean(np.asarray(ids) % 2))


class Ours:
    """Rollout pool and learner of one policy; `step` is one step of RAR without retrieval."""

    def __init__(self, spec: PolicySpec, rows: list[int], kl_coef: float) -> None:
        rar = RARConfig(
            prompts_per_step=PROMPTS,
            group_size=GROUP,
            kl_coef=kl_coef,
            steps=10_000,
            optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant"),
            cpus_per_learner=2,
            rollout={"pool": {"num_workers": 1, "cpus_per_worker": 2, "batch_size": PROMPTS}},
        )
        self._rar, self._rows = rar, rows
        self._learners = build_learners(rar, spec)
        self._rollouts = RolloutPool(spec, rar.rollout)
        self._step = 0
        self.rewards: list[float] = []
        self._push()

    def _push(self) -> None:
        found = [result.get() for result in self._learners.foreach_learner(lambda learner: learner.export_weights())]
        self._rollouts.push(Weights(*found[0]))

    def step(self) -> dict[str, float]:
        """Seconds of the next step and of its parts."""
        began = time.perf_counter()
        seeds = group_seeds(0, self._step, PROMPTS)
        groups = self._rollouts.sample(self._rows[:PROMPTS], seeds, group_size=GROUP)
        sampled = time.perf_counter()
        rewards = np.array([[reward(ids[kept]) for ids, kept in zip(g.ids, g.mask, strict=True)] for g in groups])
        self.rewards.append(float(rewards.mean()))
        advantages = group_advantages(torch.from_numpy(rewards)).numpy()
        update = time.perf_counter()
        self._learners.update(batch=learner_batch(batch_columns(groups, advantages, rewards)))
        updated = time.perf_counter()
        self._push()
        self._step += 1
        return {"step": time.perf_counter() - began, "generate": sampled - began, "update": updated - update}

    def close(self) -> None:
        self._rollouts.close()
        self._learners.shutdown()


def gradient_gap(spec: PolicySpec, rows: list[int], first: dict[str, Any], kl_coef: float) -> float:
    """Largest absolute difference of the gradients on TRL's completions, relative to TRL's largest gradient."""
    policy, processor, catalogue = spec.load_policy().eval(), spec.load_processor(), spec.catalogue.open()
    policy.backbone.load_state_dict(first["weights"])
    use_shared_prefix(policy.backbone)
    inputs = first["inputs"]
    from afmrl_ray.models.prompts import generator_input

    prompts = [generator_input(processor, catalogue, row, config=spec.generator) for row in rows[:PROMPTS]]
    mask = inputs["completion_mask"].bool()
    # TRL shuffles the completions of a generation batch before the update.
    ids = [
        np.ascontiguousarray(tokens[keep].numpy()) for tokens, keep in zip(inputs["completion_ids"], mask, strict=True)
    ]
    asked = [
        tuple(tokens[keep].tolist())
        for tokens, keep in zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
    ]
    own = {tuple(prompt.input_ids.tolist()): index for index, prompt in enumerate(prompts)}
    assert set(asked) == set(own), "the prompts are not the same tokens"
    order = [index for prompt in own.values() for index, question in enumerate(asked) if own[question] == prompt]
    grouped = [[ids[index] for index in order if own[asked[index]] == prompt] for prompt in own.values()]
    packed = pack(prompts, grouped, processor.pad_id)
    logp = policy(packed, packed.mask)
    reference = inputs.get("ref_per_token_logps")
    width = packed.mask.shape[1]
    loss, _ = grpo_loss(
        logp,
        logp.detach(),
        None if reference is None else reference[order][:, :width],
        inputs["advantages"][order],
        packed.mask,
        epsilon=0.2,
        epsilon_high=0.2,
        kl_coef=kl_coef,
        denominator=float(packed.mask.sum()),
    )
    loss.backward()
    mine = {name: value.grad for name, value in policy.backbone.named_parameters() if value.grad is not None}
    theirs = first["gradients"]
    largest = max(float(value.abs().max()) for value in theirs.values())
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs if name in mine) / largest


def side_by_side(image: bool, words: int, new_tokens: int, kl_coef: float, **settings: Any) -> tuple[str, str, list]:
    """Description of the sizes, result of the equality check, and seconds by part of both sides for each repeat."""
    from jobs.benchmarks.trl_side import TRL, prompt_processor

    bench = make_generator_bench(image=image, words=words, new_tokens=new_tokens)
    rows = list(range(4 * PROMPTS))
    catalogue = bench.reference.open()
    generator = bench.config.generator
    spec = PolicySpec(
        start=bench.checkpoint,
        generator=generator,
        adapter=AdapterConfig(kind="full", train_vision=True),
        catalogue=bench.reference,
        temperature=1.0,
        with_reference=kl_coef > 0,
        seed=0,
    )
    processor = prompt_processor(bench.checkpoint, bench.pixels)
    items = [
        (
            catalogue.image(row) if image else None,
            "\n".join(part for part in (catalogue.title(row), generator.instruction) if part),
        )
        for row in rows[:PROMPTS]
    ]
    theirs = TRL(
        bench.checkpoint,
        processor if image else processor.tokenizer,
        items,
        prompts=PROMPTS,
        group_size=GROUP,
        new_tokens=new_tokens,
        kl_coef=kl_coef,
        reward=reward,
        **settings,
    )
    theirs.step()
    gap = gradient_gap(spec, rows, theirs.first, kl_coef)
    assert gap < 1e-4, f"gradients differ from TRL's: {gap:g}"
    ours = Ours(spec, rows, kl_coef)
    ours.step()
    samples = []
    for _ in range(REPEATS):
        samples.append((ours.step(), theirs.step()))
    ours.close()
    theirs.close()
    tokens = theirs.first["inputs"]["prompt_ids"].shape[1]
    what = f"{PROMPTS} prompts of {tokens} tokens, G {GROUP}, C {new_tokens}, KL {'on' if kl_coef else 'off'}"
    return what, f"gradients on the same completions equal within {gap:.0e}", samples


def part_comparison(name: str, target: float, part: str, found: tuple[str, str, list]) -> Comparison:
    """The comparison of one part of the step, from the result of `side_by_side`."""
    what, equality, samples = found
    pairs = [(mine[part], theirs[part]) for mine, theirs in samples]
    return comparison(f"{name}, {what}", "TRL GRPOTrainer", pairs, target=target, at_most=False, equality=equality)


def comparisons() -> list[Comparison]:
    """Time the whole step and the update alone.

    Raises:
        AssertionError: the gradients of the two sides differ.
    """
    # By default, Ray's workers have a lower priority than this process.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 * 2**20,
        _temp_dir=tempfile.mkdtemp(prefix="r", dir="/tmp"),
    )
    try:
        images = side_by_side(True, 0, 32, KL)
        text = side_by_side(False, 42, 64, 0.0)
    finally:
        ray.shutdown()
    return [
        part_comparison("whole GRPO step", 3.0, "step", images),
        part_comparison("the update alone", 4.0, "update", images),
        part_comparison("whole GRPO step, text only", 1.0, "step", text),
    ]
