"""One step of AGCL on one worker: items to embeddings, embeddings to loss, loss to gradients."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from afmrl_ray.agcl.batch_layout import Direction
from afmrl_ray.agcl.gather import gather_plain, gather_with_gradient
from afmrl_ray.agcl.gradcache import backward_in_parts
from afmrl_ray.agcl.loss import (
    finish_mask,
    mask_by_attributes,
    mask_by_candidate,
    mask_by_margin,
    scale_lexical,
    weighted_info_nce,
)
from afmrl_ray.agcl.prepare import Prefetcher, Preparer, ScoredView, StepInputs
from afmrl_ray.config.train import AGCLConfig
from afmrl_ray.models.flops import EncoderFlops
from afmrl_ray.models.model_input import collate
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.stopwatch import Stopwatch

log = logging.getLogger(__name__)

_LEAST_TEMPERATURE = 0.01


class AGCLStep:
    """Forward and backward passes of one step on one worker.

    The global batch is known to every worker, so only embeddings travel: the BM25 weights and the masks of the local
    rows against all columns are computed where they are used. Columns are all positives, then all curated negatives.

    Args:
        config: `agcl`.
        preparer: makes the steps' inputs.
        engine: the encoder.
        pad_id: of its tokenizer.
        flops: counts what a step needs; none = it is not told.
        rank: of this worker.
        world: number of workers.
    """

    def __init__(
        self,
        config: AGCLConfig,
        preparer: Preparer,
        engine: Engine,
        *,
        pad_id: int,
        flops: EncoderFlops | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._agcl, self._engine, self._pad_id, self._flops = config, engine, pad_id, flops
        self._rank, self._world = rank, world
        self._ahead = Prefetcher(preparer, config.steps)
        self._warned = False

    def __call__(self, step: int) -> dict[str, float]:
        watch = Stopwatch(self._engine.device)
        with watch("data"):
            prepared = self._ahead.take(step)

        def encode(wanted: list[int]) -> Tensor:
            with watch("forward"):
                inputs = collate([prepared.rows[row] for row in wanted], self._pad_id, self._engine.device)
                return self._engine(**inputs)

        def loss(embeddings: Tensor) -> tuple[Tensor, dict[str, float]]:
            with watch("loss"):
                return self.loss(step, prepared, embeddings, watch)

        def backward(value: Tensor, last: bool) -> None:
            with watch("backward"):
                self._engine.backward(value, last=last)

        parts = prepared.parts
        stats = backward_in_parts(encode, parts, loss, backward, idle=self._most(len(parts)) - len(parts))
        return {**stats, **self._sizes(prepared), **prepared.numbers, **watch.seconds()}

    def _most(self, parts: int) -> int:
        """The largest number of parts of any worker; known without asking where nothing is cut."""
        if self._world == 1 or self._agcl.tokens_per_microbatch is None:
            return parts
        most = torch.tensor(parts, device=self._engine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def _sizes(self, prepared: StepInputs) -> dict[str, float]:
        """Samples of the step, and tokens of this worker."""
        rows, parts = prepared.rows, prepared.parts
        tokens = sum(len(row) for row in rows)
        padded = sum(max(len(rows[row]) for row in part) * len(part) for part in parts)
        needed = {"tflop": self._flops.step(rows) / 1e12} if self._flops is not None else {}
        return {
            **needed,
            "samples": float(self._agcl.batch_size),
            "tokens": float(tokens),
            "visual_tokens": float(sum(int(row.token_types.sum()) for row in rows)),
            "padding_fraction": 1 - tokens / padded,
            "microbatches": float(len(parts)),
        }

    def loss(
        self, step: int, prepared: StepInputs, embeddings: Tensor, watch: Stopwatch
    ) -> tuple[Tensor, dict[str, float]]:
        """This worker's share of the loss, and the step's numbers averaged over the workers.

        Args:
            embeddings: [rows, D] of `prepared.rows`, with the logarithm of a learned temperature in the last column.
        """
        temperature = embeddings.new_tensor(self._agcl.temperature)
        if self._agcl.learn_temperature:
            temperature = embeddings[:, -1].mean().exp().clamp(min=_LEAST_TEMPERATURE)
            embeddings = embeddings[:, :-1]
        queries, positives, negatives = embeddings.split(prepared.counts)
        with watch("gather"):
            everyone = gather_with_gradient(positives)
            if prepared.counts[2]:
                everyone = torch.cat([everyone, gather_with_gradient(negatives)])
        loss, stats = self._direction(step, prepared.query_to_positive, queries, everyone, temperature=temperature)
        if prepared.positive_to_query is not None:
            with watch("gather"):
                everyone = gather_with_gradient(queries)
            reverse, _ = self._direction(step, prepared.positive_to_query, positives, everyone, temperature=temperature)
            loss = (loss + reverse) / 2
        stats["temperature"] = float(temperature.detach())
        values = torch.tensor([*stats.values(), float(loss.detach())], dtype=torch.float64, device=loss.device)
        with watch("gather"):
            mean = dict(zip([*stats, "loss"], gather_plain(values[None]).mean(0).tolist(), strict=True))
        self._warn(step, mean["masked_fraction"])
        return loss, mean

    def _direction(
        self, step: int, task: ScoredView, own: Tensor, candidates: Tensor, *, temperature: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of the local rows against all columns, over each of a row's positives."""
        lexical_config = self._agcl.lexical
        similarity = own @ candidates.T
        raw = task.lexical.to(own.device) if task.lexical is not None else None
        found = []
        for column in task.direction.positives:
            index = torch.tensor(column, device=own.device)
            lexical = None
            if raw is not None and lexical_config.enabled:
                lexical = scale_lexical(raw, index, scale=lexical_config.scale, temperature=lexical_config.temperature)
            found.append(
                weighted_info_nce(
                    similarity,
                    index,
                    temperature=temperature,
                    lexical_scores=lexical,
                    negative_mask=self._negative_mask(
                        step, task.direction, similarity.detach(), candidates.detach(), raw, index
                    ),
                    positive_weight=lexical_config.positive_weight,
                )
            )
        loss = torch.stack([value for value, _ in found]).mean()
        return loss, {name: sum(stats[name] for _, stats in found) / len(found) for name in found[0][1]}

    def _negative_mask(
        self, step: int, task: Direction, similarity: Tensor, candidates: Tensor, raw: Tensor | None, index: Tensor
    ) -> Tensor | None:
        mask = self._agcl.mask
        shared: dict[str, Any] = {
            "product_ids": torch.tensor(task.products, device=similarity.device),
            "hard_negatives": task.exempt.to(similarity.device) if task.exempt is not None else None,
        }
        if mask.enabled and step >= mask.warmup_steps:
            shared["min_negatives"] = mask.min_negatives
            if mask.kind == "candidate":
                found = mask_by_candidate(candidates, index, threshold=mask.threshold, **shared)
            elif mask.kind == "margin":
                found = mask_by_margin(similarity, index, margin=mask.margin, **shared)
            else:
                assert raw is not None  # the config sees to it
                found = mask_by_attributes(raw, index, threshold=mask.attribute_threshold, **shared)
        elif len(task.positives) == 1 and task.valid is None:
            return None  # a batch holds each product once, so there is nothing to hide
        else:
            found = finish_mask(torch.zeros_like(similarity, dtype=torch.bool), similarity, index, **shared)
        return found if task.valid is None else found & task.valid.to(found.device)

    def _warn(self, step: int, masked: float) -> None:
        if masked > 0.5 and not self._warned and self._rank == 0:
            self._warned = True
            log.warning(
                "step %d: agcl.mask hides %.0f %% of the negatives; raise its threshold (or margin), or let it begin "
                "later with agcl.mask.warmup_steps",
                step,
                100 * masked,
            )
