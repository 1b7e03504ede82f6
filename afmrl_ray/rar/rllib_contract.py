"""What RLlib's learner stack requires of its subclasses: everything that exists only for it is here.

RLlib gives the learner group: N learners, their process group and placement, equal shards of a batch. Gradients and
optimizer belong to a DeepSpeed engine (`training.engine`), because RLlib has neither gradient accumulation nor ZeRO.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from torch import Tensor
from torch import distributed as dist

from afmrl_ray.config.rar import RARConfig
from afmrl_ray.rar.module import AttributePolicy, PolicySpec

# RLlib requires an observation and an action space; a language model has neither.
_OBSERVATIONS = gym.spaces.Box(-1, 1, (1,), np.float32)
_ACTIONS: gym.Space = gym.spaces.Discrete(2)


class LearnerConfig(AlgorithmConfig):
    """Configuration of the learner group; learners read `rar` and `policy` from it."""

    def __init__(self, rar: RARConfig, policy: PolicySpec, learner: type[TorchLearner]) -> None:
        super().__init__()
        self.rar = rar
        self.policy = policy
        self._default_learner = learner
        self.environment(observation_space=_OBSERVATIONS, action_space=_ACTIONS)
        self.learners(
            num_learners=rar.num_learners,
            num_cpus_per_learner=rar.cpus_per_learner,
            num_gpus_per_learner=rar.gpus_per_learner,
        )

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """RLlib asks the config which module a learner builds."""
        return RLModuleSpec(module_class=AttributePolicy, model_config={"policy": self.policy})

    def get_default_learner_class(self) -> type[TorchLearner]:
        """RLlib asks the config which learner class the group starts."""
        return self._default_learner


def start_learner_group(rar: RARConfig, policy: PolicySpec, learner: type[TorchLearner]) -> LearnerGroup:
    """Start `rar.num_learners` learners of a class; the caller shuts the group down."""
    config = LearnerConfig(rar, policy, learner)
    spec = config.get_multi_rl_module_spec(spaces={DEFAULT_MODULE_ID: (_OBSERVATIONS, _ACTIONS)})
    return LearnerGroup(config=config, module_spec=spec)


def learner_batch(columns: dict[str, np.ndarray]) -> MultiAgentBatch:
    """Columns of equal length as RLlib's batch type; every learner gets a contiguous, equal shard of it."""
    length = len(next(iter(columns.values())))
    return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(columns)}, env_steps=length)


class EngineLearner(TorchLearner):
    """A `TorchLearner` whose engine owns gradients and optimizer; subclasses implement `train_step`."""

    stats: dict[str, float]
    """Metrics of the last update. A side attribute, because RLlib's `update` returns only what its own logger holds."""

    def train_step(self, columns: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """One update from this learner's shard of the batch; returns its loss and the metrics of all learners."""
        raise NotImplementedError

    def build(self) -> None:
        """RLlib makes no process group for a single learner and sets no ranks for several; the engine needs both."""
        super().build()
        if not dist.is_initialized():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        # Each learner sees only its own GPU, so its local rank is 0.
        os.environ.update(LOCAL_RANK="0", RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))

    def _update(self, batch: dict[str, Any], **_: Any) -> tuple[Any, Any, Any]:
        """RLlib calls this from `update`, and logs the loss of each module."""
        columns = {name: torch.as_tensor(value) for name, value in batch[DEFAULT_MODULE_ID].items()}
        loss, self.stats = self.train_step(columns)
        return {}, {DEFAULT_MODULE_ID: loss}, {}

    def compute_loss_for_module(self, **_: Any) -> Tensor:
        """Abstract in RLlib, whose own `_update` would call it."""
        raise NotImplementedError("the loss is computed by train_step")

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """RLlib would make an Adam here; the engine has the optimizer."""

    def _make_modules_ddp_if_necessary(self) -> None:
        """RLlib would wrap the module in DDP here; the engine reduces gradients."""
