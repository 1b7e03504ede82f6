"""Fingerprints of the config: which fields count."""

from __future__ import annotations

import pytest

from afmrl_ray.config import load_config


def fingerprinted(*overrides: str) -> dict:
    config = load_config(None, overrides)
    return {name: getattr(config, name).fingerprinted() for name in ("distill", "agcl", "rar", "teacher", "evaluation")}


@pytest.mark.parametrize(
    "override",
    [
        "agcl.workers.num_workers=2",
        "agcl.workers.min_workers=1",
        "agcl.workers.max_failures=9",
        "agcl.workers.collective_timeout_s=5",
        "distill.workers.checkpoint_every=7",
        "rar.tokens_per_microbatch=5",
        "rar.num_learners=2",
        "rar.max_learner_restarts=9",
        "rar.reward.timeout_s=5",
        "rar.rollout.pool.num_workers=3",
        "rar.rollout.vllm.gpu_memory_utilization=0.5",
        "rar.rollout_logprob_diff_limit=1",
        "evaluation.pool.cpus_per_worker=2",
    ],
)
def test_runtime_only_fields_do_not_change_the_fingerprint(override):
    assert fingerprinted(override) == fingerprinted()


@pytest.mark.parametrize(
    "override",
    [
        "agcl.temperature=0.1",
        "agcl.workers.zero_stage=2",
        "agcl.pairs=[{weight: 2}]",
        "agcl.mask.threshold=0.5",
        "rar.reward.k=3",
        "rar.zero_stage=2",
        "rar.rollout={engine: vllm, pool: {gpus_per_worker: 1}}",
        "rar.task.query.inputs=image",
        "teacher.names=[a]",
        "evaluation.protocols=[{kind: retrieval, name: fine, map_k: 3}]",
    ],
)
def test_fields_that_can_change_a_result_change_the_fingerprint(override):
    assert fingerprinted(override) != fingerprinted()
