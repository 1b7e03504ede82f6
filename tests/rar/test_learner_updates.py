"""Several updates per batch of rollouts, against a plain PyTorch loop over rows that share nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from afmrl_ray.models.logprobs import completion_batch, token_logprobs
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.rar.gradient_cosine import cosine
from afmrl_ray.rar.messages import PromptGroup
from afmrl_ray.rar.prompts import batch_columns
from afmrl_ray.rar.weights import trained_tensors
from tests.rar.test_learner import GROUP, OPTIMIZER, REWARDS, assert_same_direction, columns, update  # noqa: F401

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ADVANTAGES = np.array([[1.0, -1.0], [0.5, -0.5], [2.0, -2.0], [0.0, 0.0]])
SETTINGS = {"num_learners": 0, "kl_coef": 0.0}


def regrouped(columns: dict[str, np.ndarray], **settings) -> dict[str, np.ndarray]:  # noqa: F811
    """The columns of the same rollouts with other settings of `batch_columns`."""
    groups = [
        PromptGroup(
            int(columns["row"][start]),
            0,
            *(columns[name][start : start + GROUP] for name in ("completion", "mask", "old_logp")),
            [("", True)] * GROUP,
        )
        for start in range(0, len(columns["row"]), GROUP)
    ]
    return batch_columns(groups, ADVANTAGES, REWARDS, **settings)


class PlainPolicy:
    """The policy with one padded row per completion and full logits."""

    def __init__(self, spec) -> None:
        self.model = spec.load_policy()
        self.spec, self.processor, self.catalogue = spec, spec.load_processor(), spec.catalogue.open()

    def logp(self, columns, row: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: F811
        """Log-probabilities and entropies of one completion."""
        prompt: ModelInput = generator_input(
            self.processor, self.catalogue, int(columns["row"][row]), config=self.spec.generator
        )
        tokens = columns["completion"][row][columns["mask"][row]]
        inputs, _ = completion_batch([prompt], [tokens], self.processor.pad_id)
        logits = self.model.backbone(**inputs, use_cache=False).logits[0, -len(tokens) - 1 : -1]
        every = token_logprobs(logits, temperature=1.0, forbidden_ids=self.processor.forbidden_ids)
        entropy = torch.distributions.Categorical(logits=every).entropy()
        return every.gather(-1, torch.from_numpy(tokens)[:, None])[:, 0], entropy

    def loss(self, columns, rows, *, clip: float = 0.2) -> torch.Tensor:  # noqa: F811
        """Clipped surrogate, mean over tokens."""
        total, tokens = torch.zeros(()), 0
        for row in rows:
            logp, _ = self.logp(columns, row)
            old = torch.from_numpy(columns["old_logp"][row][columns["mask"][row]])
            gain, ratio = float(columns["advantage"][row]), (logp - old).exp()
            total = total - torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain).sum()
            tokens += len(logp)
        return total / tokens


def test_two_passes_over_two_mini_batches_equal_four_steps_of_plain_pytorch(policy_spec, columns):  # noqa: F811
    split = regrouped(columns, minibatches=2)
    ours, stats = update(policy_spec, split, updates_per_batch=4, passes_per_batch=2, **SETTINGS)
    plain = PlainPolicy(policy_spec)
    parameters = [p for p in plain.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=OPTIMIZER.learning_rate, weight_decay=0.0)
    losses = []
    for part in (0, 1, 0, 1):
        loss = plain.loss(split, np.flatnonzero(split["group"] % 2 == part))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert stats["actor/loss"] == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-5)
    assert stats["actor/ratio_max"] > 1.01, "the old policy moved with the new one"
    assert stats["actor/rollout_logprob_diff"] < 1e-5, "not that of the first update"
    start = trained_tensors(policy_spec.load_policy())
    theirs = trained_tensors(plain.model)
    moved = torch.cat([(theirs[n] - start[n]).flatten() for n in start])
    found = torch.cat([(ours[n].float() - start[n]).flatten() for n in start])
    assert torch.nn.functional.cosine_similarity(moved, found, dim=0) > 0.99


@pytest.mark.parametrize("changes", [{"num_learners": 2}, {"tokens_per_microbatch": 60}, {"zero_stage": 2}])
def test_mini_batches_do_not_depend_on_learners_micro_batches_or_partitions(policy_spec, columns, changes):  # noqa: F811
    split = regrouped(columns, minibatches=2)
    how = {**SETTINGS, "updates_per_batch": 2}
    whole, whole_stats = update(policy_spec, split, **how)
    parts, stats = update(policy_spec, split, **{**how, **changes})
    for name in ("actor/loss", "actor/grad_norm", "actor/entropy", "actor/ratio_max"):
        assert stats[name] == pytest.approx(whole_stats[name], rel=1e-3, abs=1e-5)
    assert_same_direction(policy_spec, parts, whole)


def test_clips_and_importance_weights_act_on_stale_rollouts(policy_spec, columns):  # noqa: F811
    gap = np.where(columns["mask"], 0.5, 0.0).astype(np.float32)
    stale = columns | {"old_logp": columns["old_logp"] - gap}
    _, clipped = update(policy_spec, stale, grpo={"old_logprobs": "sampler"}, max_staleness=1, **SETTINGS)
    assert clipped["actor/ratio"] == pytest.approx(np.exp(0.5), rel=1e-3)
    assert clipped["actor/clip_ratio_high"] > 0.1
    assert "actor/tis_weight" not in clipped
    _, weighted = update(policy_spec, stale, max_staleness=1, **SETTINGS)
    assert weighted["actor/ratio"] == pytest.approx(1.0, rel=1e-4)
    assert weighted["actor/tis_weight"] == pytest.approx(np.exp(0.5), rel=1e-3)
    _, again = update(policy_spec, stale, max_staleness=1, updates_per_batch=2, passes_per_batch=2, **SETTINGS)
    assert again["actor/tis_weight"] == pytest.approx(np.exp(0.5), rel=1e-3), "the weight moved with the policy"
    assert again["actor/ratio_max"] > 1.001


def test_groups_of_weight_zero_do_not_change_the_update(policy_spec, columns):  # noqa: F811
    left_out = regrouped(columns, exclude_zero_variance=True)
    assert (left_out["weight"] == 0).sum() == GROUP
    ours, stats = update(policy_spec, left_out, **SETTINGS)
    three = {name: value[left_out["weight"] > 0] for name, value in left_out.items()}
    theirs, expected = update(policy_spec, three, **SETTINGS)
    for name in ("actor/loss", "actor/grad_norm", "actor/rollout_logprob_diff"):
        assert stats[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    assert_same_direction(policy_spec, ours, theirs)


def test_entropy_and_gradient_cosine_equal_plain_pytorch_and_leave_the_update_alone(policy_spec, columns):  # noqa: F811
    quiet = {**SETTINGS, "grpo": {"entropy_every": 0}}
    alone, without = update(policy_spec, columns, **quiet)
    ours, stats = update(policy_spec, columns, gradient_cosine_every=1, **SETTINGS)
    assert not {"actor/entropy", "actor/gradient_cosine"} & without.keys()
    assert all(torch.equal(ours[name], alone[name]) for name in alone)
    plain = PlainPolicy(policy_spec)
    parameters = [p for p in plain.model.parameters() if p.requires_grad]
    halves = [
        list(torch.autograd.grad(plain.loss(columns, np.flatnonzero(columns["group"] % 2 == half)), parameters,
                                 allow_unused=True, materialize_grads=True))
        for half in (0, 1)
    ]  # fmt: skip
    assert stats["actor/gradient_cosine"] == pytest.approx(cosine(*halves), abs=1e-3)
    with torch.no_grad():
        entropies = torch.cat([plain.logp(columns, row)[1] for row in range(len(columns["row"]))])
    assert stats["actor/entropy"] == pytest.approx(float(entropies.mean()), rel=1e-4)
    bonus, _ = update(policy_spec, columns, **{**SETTINGS, "grpo": {"entropy_coef": 0.5}})
    assert any(not torch.equal(bonus[name], alone[name]) for name in alone), "the bonus changes nothing"
