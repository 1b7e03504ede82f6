from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import ray
import torch

from afmrl_ray.config.rar import RolloutConfig
from afmrl_ray.errors import WeightsLostError, WeightSyncError
from afmrl_ray.rar.messages import Weights
from afmrl_ray.rar.rollout import RolloutPool
from afmrl_ray.rar.weights import trained_tensors, weights_fingerprint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
ROWS, SEEDS = list(range(6)), list(range(100, 106))


def pool_of(spec, workers: int, **changes) -> RolloutPool:
    config = RolloutConfig(pool={"num_workers": workers, "cpus_per_worker": 0.5, "batch_size": 2}, **changes)
    return RolloutPool(spec, config)


def weights_of(spec, version: int, shift: float = 0.0) -> Weights:
    tensors = {name: tensor + shift for name, tensor in trained_tensors(spec.load_policy()).items()}
    return Weights(version, weights_fingerprint(tensors), [ray.put(tensors)])


def same(first, second) -> bool:
    return all(
        a.row == b.row and np.array_equal(a.ids, b.ids) and np.array_equal(a.logp, b.logp)
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def expected(ray_local, policy_spec):
    pool = pool_of(policy_spec, 1)
    pool.push(weights_of(policy_spec, 0))
    groups = pool.sample(ROWS, SEEDS, group_size=3)
    pool.close()
    return groups


def test_rollouts_do_not_depend_on_the_number_of_actors(expected, policy_spec):
    pool = pool_of(policy_spec, 2)
    pool.push(weights_of(policy_spec, 0))
    assert [group.row for group in expected] == ROWS
    assert same(pool.sample(ROWS, SEEDS, group_size=3), expected)
    assert not same(pool.sample(ROWS, [seed + 1 for seed in SEEDS], group_size=3), expected)
    pool.close()


def test_pushed_weights_reach_the_sampler_and_carry_their_version(expected, policy_spec):
    pool = pool_of(policy_spec, 1)
    pool.push(weights_of(policy_spec, 4, shift=0.05))
    groups = pool.sample(ROWS, SEEDS, group_size=3)
    assert {group.version for group in groups} == {4}
    assert not same(groups, expected)
    pool.push(weights_of(policy_spec, 5))
    assert same(pool.sample(ROWS, SEEDS, group_size=3), expected)
    pool.close()


def test_weights_with_another_fingerprint_are_refused(ray_local, policy_spec):
    pool = pool_of(policy_spec, 1)
    honest = weights_of(policy_spec, 1)
    with pytest.raises(WeightSyncError, match="rollout actor 0"):
        pool.push(Weights(1, "0" * 64, honest.reference))
    partial = dict(list(ray.get(honest.reference[0]).items())[1:])
    with pytest.raises(Exception, match="pushed weights do not fit the policy: 1 names differ"):
        pool.push(Weights(1, honest.fingerprint, [ray.put(partial)]))
    pool.close()


def test_weights_whose_exporter_died_raise_weights_lost(ray_local, policy_spec):
    @ray.remote(num_cpus=0)
    class Exporter:
        def put(self, tensors):
            return [ray.put(tensors)]

    pool = pool_of(policy_spec, 1)
    held = weights_of(policy_spec, 3)
    exporter = Exporter.remote()
    reference = ray.get(exporter.put.remote(ray.get(held.reference[0])))
    ray.kill(exporter)
    with pytest.raises(WeightsLostError, match="weights 3 were lost before rollout actor 0 had them"):
        pool.push(Weights(3, held.fingerprint, reference))
    pool.push(held)
    pool.close()


def test_an_actor_refuses_to_sample_another_version(ray_local, policy_spec):
    pool = pool_of(policy_spec, 1)
    pool.push(weights_of(policy_spec, 1))
    call = pool.actors[0].sample.remote([0], [1], group_size=2, version=2)
    with pytest.raises(WeightSyncError, match="asked for rollouts of version 2, the worker holds 1"):
        ray.get(call)
    pool.close()


def test_chunks_of_a_killed_actor_are_sampled_again_with_the_same_result(expected, policy_spec):
    pool = pool_of(policy_spec, 2)
    pool.push(weights_of(policy_spec, 0))
    pids = [ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) for actor in pool.actors]
    os.kill(pids[0], signal.SIGKILL)
    assert same(pool.sample(ROWS, SEEDS, group_size=3), expected)
    assert pool.restarts == 1
    pool.close()


def test_a_replacement_that_dies_before_it_has_weights_is_replaced(expected, policy_spec, monkeypatch):
    pool = pool_of(policy_spec, 1)
    pool.push(weights_of(policy_spec, 0))
    make, made = pool._make, []

    def make_and_kill_the_first_two(index):
        made.append(make(index))
        if len(made) == 1:
            ray.kill(made[0])
        elif len(made) == 2:
            os.kill(ray.get(made[1].__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        return made[-1]

    monkeypatch.setattr(pool, "_make", make_and_kill_the_first_two)
    ray.kill(pool.actors[0])
    assert same(pool.sample(ROWS, SEEDS, group_size=3), expected)
    assert pool.restarts == len(made) == 3
    pool.close()


def test_actors_that_keep_dying_fail_the_job(ray_local, policy_spec):
    pool = pool_of(policy_spec, 1, max_restarts=0)
    pool.push(weights_of(policy_spec, 0))
    ray.kill(pool.actors[0])
    with pytest.raises(RuntimeError, match=r"more than rar\.rollout\.max_restarts 0 allows"):
        pool.sample(ROWS, SEEDS, group_size=3)
    pool.close()


def test_the_reference_of_the_policy_is_a_frozen_copy(policy_spec):
    reference = policy_spec.load_reference()
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    policy = trained_tensors(policy_spec.load_policy())
    held = dict(reference.named_parameters())
    assert policy
    assert all(torch.equal(tensor, held[name]) for name, tensor in policy.items())
