"""One training step on one worker: inputs to embeddings, embeddings to loss, loss to gradients."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from afmrl_ray.agcl.encoder import StepInputs, TrainableEncoder
from afmrl_ray.agcl.gather import gather_plain
from afmrl_ray.agcl.gradcache import backward_in_parts
from afmrl_ray.agcl.prepare import Prefetcher, Preparer
from afmrl_ray.agcl.statistics import fractions_of
from afmrl_ray.config.train import AGCLConfig
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.stopwatch import Stopwatch

log = logging.getLogger(__name__)

_HIGH_MASKED_FRACTION = 0.5


class AGCLStep:
    """Forward and backward passes of a step on one worker, for any kind of encoder.

    Every worker knows the whole batch, so only embeddings are exchanged: BM25 weights and masks of the local rows
    against all columns are computed locally.

    Args:
        config: `agcl`.
        encoder: makes embeddings and loss.
        preparer: makes the inputs of a step.
        engine: trains `encoder.module`.
        rank: of this worker.
        world: number of workers.
    """

    def __init__(
        self,
        config: AGCLConfig,
        encoder: TrainableEncoder[Any],
        preparer: Preparer[Any],
        engine: Engine,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._agcl, self._encoder, self._engine = config, encoder, engine
        self._rank, self._world = rank, world
        self._prefetcher: Prefetcher[StepInputs[Any]] = Prefetcher(preparer.prepare, config.steps)
        self._warned = False

    def __call__(self, step: int) -> dict[str, float]:
        """Add the gradients of a step; its metrics, those under `train/` averaged over the workers."""
        watch = Stopwatch(self._engine.device)
        with watch("data"):
            inputs = self._prefetcher.take(step)

        def encode(part: list[int]) -> Tensor:
            with watch("forward"):
                return self._encoder.embed(self._engine, [inputs.inputs[index] for index in part])

        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, float]]:
            with watch("loss"):
                value, stats = self._encoder.loss(step, inputs, embeddings, watch)
                return value, self._averaged({**stats, "loss": float(value.detach())}, watch)

        def backward(value: Tensor, last: bool) -> None:
            with watch("backward"):
                self._engine.backward(value, last=last)

        parts = inputs.parts
        stats = backward_in_parts(encode, parts, loss, backward, idle=self._max_parts(len(parts)) - len(parts))
        self._warn_of_mask(step, stats.get("masked_fraction", 0.0))
        return {
            **{f"train/{name}": value for name, value in stats.items()},
            **self._sizes(inputs),
            **inputs.metrics,
            **watch.seconds(),
        }

    def _averaged(self, stats: dict[str, float], watch: Stopwatch) -> dict[str, float]:
        """Means over the workers, and fractions of these means."""
        values = torch.tensor([*stats.values()], dtype=torch.float64, device=self._engine.device)
        with watch("gather"):
            means = gather_plain(values[None]).mean(0).tolist()
        return fractions_of(dict(zip(stats, means, strict=True)))

    def _max_parts(self, parts: int) -> int:
        """The largest number of parts of any worker; without a collective call if nothing is cut."""
        if self._world == 1 or self._agcl.tokens_per_microbatch is None:
            return parts
        most = torch.tensor(parts, device=self._engine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def _sizes(self, inputs: StepInputs[Any]) -> dict[str, float]:
        """Pairs of the step over all workers; tokens, padding and micro-batches of this worker."""
        lengths = [[length for index in part if (length := len(inputs.inputs[index]))] for part in inputs.parts]
        tokens = sum(map(sum, lengths))
        padded = sum(max(part) * len(part) for part in lengths if part)
        return {
            "data/samples": float(self._agcl.batch_size),
            "data/tokens": float(tokens),
            "data/padding_fraction": 1 - tokens / padded if padded else 0.0,
            "data/microbatches": float(len(inputs.parts)),
        }

    def _warn_of_mask(self, step: int, masked: float) -> None:
        if masked > _HIGH_MASKED_FRACTION and not self._warned and self._rank == 0:
            self._warned = True
            log.warning(
                "step %d: agcl.mask hides %.0f %% of the negatives; raise its threshold (or margin), or start it later "
                "with agcl.mask.warmup_steps",
                step,
                100 * masked,
            )
