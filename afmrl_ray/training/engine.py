"""DeepSpeed engine of all three trainings: an optimizer step accumulates any number of backward passes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from afmrl_ray import storage
from afmrl_ray.config.models import OptimizerConfig
from afmrl_ray.errors import CheckpointError
from afmrl_ray.training.checksums import verify_checksums, write_checksums
from afmrl_ray.training.reshard import universal_checkpoint

_TAG = "engine"
_LAYOUT = "layout.json"


def schedule_factor(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Learning rate of a step relative to the peak: linear warm-up, then constant, linear or cosine decay."""
    warmup = round(config.warmup_ratio * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if config.schedule == "linear":
            return 1.0 - progress
        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor


class Engine:
    """A model under DeepSpeed; parameters without `requires_grad` stay frozen. The process group must exist.

    Args:
        model: module that is trained.
        optimizer: AdamW settings.
        steps: length of the schedule.
        zero_stage: DeepSpeed ZeRO stage.
        bf16: train in bfloat16 with float32 masters.
    """

    def __init__(
        self, model: nn.Module, optimizer: OptimizerConfig, *, steps: int, zero_stage: int, bf16: bool = False
    ) -> None:
        deepspeed = _import_deepspeed()
        self._zero_stage, self.bf16 = zero_stage, bf16
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._all_parameters = list(model.parameters())
        factor = schedule_factor(optimizer, steps)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=self.parameters,
            config=_deepspeed_config(optimizer, zero_stage, bf16),
            lr_scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(inner, factor),
            dist_init_required=False,
        )
        if bf16 and zero_stage == 0:
            _forget_first_step(self._engine.optimizer)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return torch.device(self._engine.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of the model."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of `loss`; gradients are averaged over the ranks once, in the `last` pass of a step.

        Without the explicit boundary ZeRO 1 and 2 would keep only the gradient of the last pass.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self) -> dict[str, float]:
        """Clip, update, advance the schedule; returns `learning_rate` (as used) and `grad_norm` (before clipping)."""
        rate = float(self._engine.get_lr()[0])
        # DeepSpeed reports the norm only if it partitions; without partitions the gradients are complete here.
        grads = [p.grad for p in self.parameters if p.grad is not None] if self._zero_stage == 0 else []
        # In the gradients' own bfloat16 the norm would be rounded to two digits.
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else None
        self._engine.step()
        norm = norm if norm is not None else self._engine.get_global_grad_norm()
        return {"learning_rate": rate, "grad_norm": float(norm) if norm is not None else float("nan")}

    @property
    def layout(self) -> dict[str, int]:
        """Number of workers and ZeRO stage, which decide how `save` partitions a checkpoint."""
        return {"world_size": dist.get_world_size(), "zero_stage": self._zero_stage}

    def save(self, directory: str) -> None:
        """Write this rank's part of weights and optimizer state, with checksums; call it on every rank."""
        self._engine.save_checkpoint(directory, tag=_TAG, exclude_frozen_parameters=True)
        if dist.get_rank() == 0:
            storage.write_json(os.path.join(directory, _LAYOUT), self.layout)
        write_checksums(directory, dist.get_rank())

    def load(self, directory: str, *, location: str, remedy: str) -> None:
        """Load what `save` wrote, with any number of ranks; call it on every rank.

        Without partitions (ZeRO 0) every rank reads the same files; partitions of another number of ranks are converted
        first.

        Args:
            directory: local folder of the checkpoint.
            location: where a user finds the checkpoint, for messages.
            remedy: what a user can do about a damaged checkpoint, other than restoring a copy, for messages.

        Raises:
            FileNotFoundError: the directory holds no such checkpoint.
            CheckpointError: it is damaged, was written with another ZeRO stage, or cannot be converted.
        """
        saved = storage.read_json(os.path.join(directory, _LAYOUT))
        stage, writers = saved["zero_stage"], saved["world_size"]
        if stage != self._zero_stage:
            raise CheckpointError(
                f"{directory}: written with ZeRO {stage}, this training has zero_stage {self._zero_stage}; "
                f"set zero_stage={stage}, or use another run.name to start from the first step"
            )
        rank, world = dist.get_rank(), dist.get_world_size()
        verify_checksums(directory, location=location, writers=writers, rank=rank, world=world, remedy=remedy)
        if self._zero_stage == 0 or writers == world:
            self._read(directory)
            return
        with universal_checkpoint(directory, _TAG, writers=writers) as converted:
            # DeepSpeed reads this setting when it loads; that a conversion is needed is known only after construction.
            self._engine._config.load_universal_checkpoint = True
            self._read(converted)
            self._engine._config.load_universal_checkpoint = False

    def _read(self, directory: str) -> None:
        path, _ = self._engine.load_checkpoint(directory, tag=_TAG, load_module_strict=False)
        if path is None:
            raise FileNotFoundError(f"{directory}: no DeepSpeed checkpoint {_TAG!r}")

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Inside the context every rank holds all parameters whole; ZeRO 3 shards them all, frozen ones too."""
        deepspeed = _import_deepspeed()
        with deepspeed.zero.GatheredParameters(self._all_parameters, enabled=self._zero_stage == 3):
            yield

    def close(self) -> None:
        """Release what DeepSpeed holds."""
        self._engine.destroy()


def _deepspeed_config(optimizer: OptimizerConfig, zero_stage: int, bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.max_grad_norm,
        "steps_per_print": 10**9,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "weight_decay": optimizer.weight_decay,
                # torch's AdamW, which needs no compiled op
                "torch_adam": True,
            },
        },
        "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
    }


def _forget_first_step(optimizer: Any) -> None:
    """Undo the step without gradients by which DeepSpeed allocates the optimizer state of its float32 masters.

    Only its optimizer without partitions makes one. Adam would count it, so its first real updates would be too small.
    """
    optimizer.optimizer.state.clear()
    with torch.no_grad():
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)


def _import_deepspeed() -> Any:
    import logging

    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Otherwise every initialize on CPU compiles this op for a minute; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
