"""The update of the learners: independent of the micro-batches and of the number of learners."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from deepspeed.utils import safe_get_full_fp32_param

from afmrl_ray.config.models import AdapterConfig, OptimizerConfig
from afmrl_ray.config.rar import RARConfig, RolloutConfig
from afmrl_ray.rar.engine import TransformersEngine
from afmrl_ray.rar.learner import GRPOLearner, build_learners
from afmrl_ray.rar.loss import group_advantages
from afmrl_ray.rar.messages import Weights
from afmrl_ray.rar.prompts import batch_columns
from afmrl_ray.rar.rllib_contract import learner_batch
from afmrl_ray.rar.rollout import RolloutPool
from afmrl_ray.rar.weights import trained_tensors, weights_fingerprint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
GROUP = 2
REWARDS = np.array([[1.0, 0.0], [0.5, 0.25], [0.0, 1.0], [0.75, 0.75]])
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.0)


@pytest.fixture(scope="module")
def columns(ray_local, policy_spec) -> dict[str, np.ndarray]:
    """Four groups sampled by the policy itself, with made-up advantages."""
    pool = RolloutPool(policy_spec, RolloutConfig(pool={"cpus_per_worker": 0.5, "batch_size": 4}))
    tensors = trained_tensors(policy_spec.load_policy())
    pool.push(Weights(0, weights_fingerprint(tensors), [ray.put(tensors)]))
    groups = pool.sample([0, 1, 2, 3], [7, 8, 9, 10], group_size=GROUP)
    pool.close()
    advantages = np.array([[1.0, -1.0], [0.5, -0.5], [2.0, -2.0], [0.0, 0.0]])
    return batch_columns(groups, advantages, REWARDS)


def update(
    policy_spec, columns, steps: int = 1, *, load: str = "", save: str = "", **changes
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Trained tensors and metrics after the updates, `save` taken before the last one or `load` before the first."""
    rar = RARConfig(
        **{"group_size": GROUP, "prompts_per_step": 4, "optimizer": OPTIMIZER, "kl_coef": 0.1, "steps": 4,
           "cpus_per_learner": 0.5, **changes}
    )  # fmt: skip
    learners = build_learners(rar, policy_spec)
    try:
        if load:
            [result.get() for result in learners.foreach_learner(lambda learner: learner.load_engine(load, steps - 1))]
        for step in range(steps - 1 if load else 0, steps):
            if save and step == steps - 1:
                [result.get() for result in learners.foreach_learner(lambda learner: learner.save_engine(save))]
            learners.update(batch=learner_batch(columns))
        exported = [result.get() for result in learners.foreach_learner(lambda learner: learner.export_weights())]
        stats = [result.get() for result in learners.foreach_learner(lambda learner: learner.stats)]
    finally:
        learners.shutdown()
    version, fingerprint, reference = next(found for found in exported if found)
    tensors = ray.get(reference[0])
    assert version == steps
    assert weights_fingerprint(tensors) == fingerprint
    return tensors, stats[0]


@pytest.fixture(scope="module")
def whole(policy_spec, columns):
    return update(policy_spec, columns, num_learners=0, tokens_per_microbatch=10**6)


def assert_same_direction(policy_spec, ours, theirs):
    """Compare updates where the gradient is more than rounding error, since Adam's first step is its sign."""
    start = trained_tensors(policy_spec.load_policy())
    for name, tensor in theirs.items():
        moved = (tensor - start[name]).abs() > 0.9e-3
        close = torch.isclose(ours[name], tensor, atol=1e-5, rtol=1e-4)
        assert close[moved].float().mean() > 0.995 if moved.any() else True, name


def test_sampler_and_learner_agree_on_fresh_rollouts(whole):
    _, stats = whole
    assert stats["actor/rollout_logprob_diff"] < 1e-5
    assert stats["actor/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert stats["actor/kl"] == pytest.approx(0.0, abs=1e-6)
    assert stats["actor/microbatches"] == 1


def test_the_update_does_not_depend_on_the_microbatches(policy_spec, columns, whole):
    tensors, stats = update(policy_spec, columns, num_learners=0, tokens_per_microbatch=60)
    assert stats["actor/microbatches"] > 3
    for name in ("actor/loss", "actor/policy_loss", "actor/kl", "actor/grad_norm"):
        assert stats[name] == pytest.approx(whole[1][name], rel=1e-4, abs=1e-6)
    assert_same_direction(policy_spec, tensors, whole[0])


def test_the_update_does_not_depend_on_prompt_sharing(policy_spec, columns, whole):
    tensors, stats = update(policy_spec, columns, num_learners=0, tokens_per_microbatch=10**6, shared_prompt="off")
    assert (stats["actor/shared_prompt"], whole[1]["actor/shared_prompt"]) == (0, 1)
    metrics = ("loss", "policy_loss", "kl", "grad_norm", "rollout_logprob_diff")
    for name in (f"actor/{metric}" for metric in metrics):
        assert stats[name] == pytest.approx(whole[1][name], rel=1e-4, abs=1e-6)
    assert_same_direction(policy_spec, tensors, whole[0])


def test_a_shared_prompt_with_other_logprobs_is_detected_at_the_first_update(policy_spec, columns, monkeypatch, caplog):
    from afmrl_ray.rar import module

    def wrong(prompts, completions, pad_id, device):
        # Completions at shifted positions, as if their prompt was longer.
        packed = pack(prompts, completions, pad_id, device)
        places = packed.places[packed.mask]
        packed.inputs["position_ids"][:, :, places] += 40
        return packed

    pack = module.pack
    monkeypatch.setattr(module, "pack", wrong)
    _, stats = update(policy_spec, columns, num_learners=0, shared_prompt="auto")
    assert stats["actor/shared_prompt"] == 0
    assert "going on with separate rows" in caplog.text
    with pytest.raises(RuntimeError, match=r"set rar\.shared_prompt to off"):
        update(policy_spec, columns, num_learners=0, shared_prompt="on")


@pytest.mark.parametrize(
    ("learners", "zero_stage"),
    [(1, 0), (2, 0), *(pytest.param(2, stage, marks=pytest.mark.slow) for stage in (1, 2)), (2, 3)],
)
def test_the_update_does_not_depend_on_the_number_of_learners(policy_spec, columns, whole, learners, zero_stage):
    settings = {"num_learners": learners, "zero_stage": zero_stage, "tokens_per_microbatch": 150}
    tensors, stats = update(policy_spec, columns, **settings)
    for name in ("actor/loss", "actor/policy_loss", "actor/grad_norm"):
        assert stats[name] == pytest.approx(whole[1][name], rel=1e-4, abs=1e-6)
    assert_same_direction(policy_spec, tensors, whole[0])


@pytest.mark.parametrize("changes", [{}, {"num_learners": 2, "tokens_per_microbatch": 150}, {"zero_stage": 3}])
def test_kl_in_the_reward_equals_an_update_with_rewards_computed_by_hand(policy_spec, columns, changes):
    # At the start the policy is its reference, so a sampler that is off by `gap` has exactly that KL.
    gap = np.where(columns["mask"], np.random.default_rng(0).normal(size=columns["mask"].shape), 0.0)
    off = columns | {"old_logp": (columns["old_logp"] + gap).astype(np.float32)}
    rewards = REWARDS - 0.1 * gap.sum(1).reshape(REWARDS.shape)
    by_hand = group_advantages(torch.from_numpy(rewards), scale="batch").numpy()
    settings = {"scale_rewards": "batch", "num_learners": 0}
    theirs, their_stats = update(
        policy_spec, off | {"advantage": by_hand.reshape(-1).astype(np.float32)}, kl_coef=0.0, **settings
    )
    in_reward = {"kl_in_reward": True, "kl": "k1"}
    ours, stats = update(policy_spec, off, grpo=in_reward, **(settings | changes))
    assert stats["actor/policy_loss"] == pytest.approx(their_stats["actor/policy_loss"], rel=1e-4)
    assert stats["actor/loss"] == pytest.approx(stats["actor/policy_loss"]), "the KL counts twice"
    assert stats["actor/grad_norm"] == pytest.approx(their_stats["actor/grad_norm"], rel=1e-4)
    assert_same_direction(policy_spec, ours, theirs)
    _, plain = update(policy_spec, off, **settings, kl_coef=0.0)
    assert abs(plain["actor/policy_loss"] - stats["actor/policy_loss"]) > 1e-2, "the KL changes nothing"


def test_the_update_moves_the_policy_and_the_kl_to_the_start_with_it(policy_spec, columns):
    tensors, stats = update(policy_spec, columns, steps=3, num_learners=0)
    start = trained_tensors(policy_spec.load_policy())
    assert any(not torch.equal(tensors[name], start[name]) for name in start)
    assert stats["actor/kl"] > 1e-6
    assert stats["actor/rollout_logprob_diff"] > 1e-4


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_one_learner_resumes_the_checkpoint_of_two(policy_spec, columns, tmp_path, zero_stage):
    shared: dict = {"steps": 3, "zero_stage": zero_stage}
    path = str(tmp_path / "engine")
    two, two_stats = update(policy_spec, columns, save=path, num_learners=2, **shared)
    one, one_stats = update(policy_spec, columns, load=path, num_learners=0, **shared)
    for name in ("actor/loss", "actor/kl", "actor/grad_norm", "actor/learning_rate"):
        assert one_stats[name] == pytest.approx(two_stats[name], rel=1e-4, abs=1e-6)
    assert_same_direction(policy_spec, one, two)


def masters(learner: GRPOLearner) -> dict[str, torch.Tensor]:
    """The float32 weights behind the trained ones."""
    trained = {name: p for name, p in learner._policy.policy.named_parameters() if p.requires_grad}
    if learner.config.rar.zero_stage:
        return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in trained.items()}
    (found,) = learner._engine._engine.optimizer.fp32_groups
    return {name: master.detach().clone() for name, master in zip(trained, found, strict=True)}


@pytest.mark.parametrize(("kind", "zero_stage"), [("full", 0), ("lora", 0), ("lora", 1), ("full", 2), ("lora", 3)])
def test_in_bfloat16_rollouts_get_rounded_masters_and_checkpoints_keep_float32(
    policy_spec, columns, tmp_path, kind, zero_stage
):
    spec = replace(
        policy_spec,
        generator=policy_spec.generator.model_copy(update={"dtype": "bfloat16"}),
        adapter=AdapterConfig(kind=kind, r=4),
    )
    rar = RARConfig(
        group_size=GROUP, prompts_per_step=4, optimizer=OPTIMIZER, num_learners=0, cpus_per_learner=0.5, steps=4,
        zero_stage=zero_stage,
    )  # fmt: skip
    path = str(tmp_path / "engine")

    def updated(load: bool) -> tuple[dict[str, torch.Tensor], Weights]:
        learners = build_learners(rar, spec)
        try:
            if load:
                learners.foreach_learner(lambda learner: learner.load_engine(path, 2))
            else:
                for _ in range(2):
                    learners.update(batch=learner_batch(columns))
                learners.foreach_learner(lambda learner: learner.save_engine(path))
            (found,) = learners.foreach_learner(lambda learner: (masters(learner), Weights(*learner.export_weights())))
            return found.get()
        finally:
            learners.shutdown()

    whole, weights = updated(load=False)
    exported = ray.get(weights.reference[0])
    start = trained_tensors(spec.load_policy())
    assert {tensor.dtype for tensor in (*start.values(), *exported.values())} == {torch.bfloat16}
    assert any(not torch.equal(exported[name], start[name]) for name in start)
    assert any(not torch.equal(master.bfloat16().float(), master) for master in whole.values()), "masters are rounded"
    for name, master in whole.items():
        assert torch.equal(exported[name], master.bfloat16()), name
    sampler = TransformersEngine(spec, RolloutConfig(), threads=1)
    assert sampler.set_weights(weights) == (weights.version, weights.fingerprint)
    loaded, again = updated(load=True)
    assert (again.version, again.fingerprint) == (weights.version, weights.fingerprint)
    assert all(torch.equal(loaded[name], master) for name, master in whole.items())
