from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import torch

from afmrl_ray.config.models import AdapterConfig
from afmrl_ray.rar.module import COMPLETION, MASK, ROW, AttributePolicy


def test_log_probabilities_are_computed_without_dropout(policy_spec):
    spec = replace(policy_spec, adapter=AdapterConfig(kind="lora", r=4, dropout=0.5))
    module = AttributePolicy(
        observation_space=gym.spaces.Box(-1, 1, (1,), np.float32),
        action_space=gym.spaces.Discrete(2),
        model_config={"policy": spec},
    )
    for name, parameter in module.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    batch = {ROW: torch.tensor([3, 3]), COMPLETION: torch.tensor([[40, 41, 42]] * 2), MASK: torch.ones(2, 3)}
    with torch.no_grad():
        first, again = (module.forward_train(batch) for _ in range(2))
    assert torch.equal(first["logp"], again["logp"])
    assert (first["logp"] - first["ref_logp"]).abs().max() > 1e-3
