"""One step of a dual encoder on one worker: one pass through both towers, then the sum of the objectives."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from afmrl_ray.agcl.dual_loss import contrast, hard_text_loss
from afmrl_ray.agcl.dual_prepare import DualPreparer, DualStepInputs
from afmrl_ray.agcl.gather import gather_plain, gather_with_gradient
from afmrl_ray.agcl.prepare import Prefetcher
from afmrl_ray.config import Config
from afmrl_ray.models.dual_encoder import DualProcessor, fuse, zeros_where_missing
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.stopwatch import Stopwatch


class DualStep:
    """Forward and backward pass of one step on one worker; embeddings of all workers are each other's negatives.

    Args:
        config: the whole config.
        preparer: makes the steps' inputs.
        engine: the towers.
        processor: of the checkpoint.
        rank: of this worker.
        world: number of workers.
    """

    def __init__(
        self,
        config: Config,
        preparer: DualPreparer,
        engine: Engine,
        processor: DualProcessor,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._agcl, self._dual = config.agcl, config.encoder.dual_encoder
        self._engine, self._processor = engine, processor
        self._rank, self._world = rank, world
        self._ahead: Prefetcher[DualStepInputs] = Prefetcher(preparer, config.agcl.steps)

    def __call__(self, step: int) -> dict[str, float]:
        watch = Stopwatch(self._engine.device)
        with watch("data"):
            prepared = self._ahead.take(step)
        rows = [*prepared.items, *prepared.regions, *[row for texts in prepared.texts for row in texts]]
        with watch("forward"):
            images, texts = self._engine(**self._processor.collate(rows, self._engine.device))
            images = zeros_where_missing(images, [row.pixels is not None for row in rows])
            texts = zeros_where_missing(texts, [row.input_ids is not None for row in rows])
        with watch("loss"):
            losses = self.losses(prepared, images, texts)
            total = torch.stack(list(losses.values())).sum()
        with watch("backward"):
            self._engine.backward(total)
        means = gather_plain(torch.stack([*losses.values(), total]).detach()[None]).mean(0).tolist()
        sizes = {
            "samples": float(self._agcl.batch_size),
            "tokens": float(sum(len(row) for row in rows)),
            "regions": float(sum(row.pixels is not None for row in prepared.regions)),
            "changed_texts": float(sum(row.input_ids is not None for texts in prepared.texts for row in texts[1:])),
        }
        return {**dict(zip([*losses, "loss"], means, strict=True)), **sizes, **prepared.numbers, **watch.seconds()}

    def losses(self, prepared: DualStepInputs, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """This worker's share of each objective, weighted; averaged over the workers they are those of the batch.

        Args:
            images: [rows, D] of items, regions and texts in this order, zero where a row has no image.
            texts: [rows, D] the same of texts.
        """
        dual, count = self._dual, len(prepared.items)
        ends = [count, count + len(prepared.regions)]
        item = images[: ends[0]], texts[: ends[0]]
        found = {}
        if dual.pair_weight:
            found["pair_loss"] = dual.pair_weight * self._pair_loss(fuse(*item))
        if dual.image_text_weight:
            there = [row.pixels is not None and row.input_ids is not None for row in prepared.items]
            found["image_text_loss"] = dual.image_text_weight * self._both_ways(
                *item, there, torch.tensor(prepared.products)
            )
        if dual.region_weight:
            there = [row.pixels is not None for row in prepared.regions]
            place = slice(ends[0], ends[1])
            # Equal phrases are no negatives of one another, wherever their images come from.
            codes = torch.tensor([_code(phrase) for phrase in prepared.phrases])
            found["region_loss"] = dual.region_weight * self._both_ways(images[place], texts[place], there, codes)
        if dual.hard_text_weight:
            found["hard_text_loss"] = dual.hard_text_weight * self._hard_texts(prepared, item[0], texts[ends[1] :])
        return found

    def _pair_loss(self, items: Tensor) -> Tensor:
        """Mean over queries and, as they are looked for too, over positives; a batch holds each product once."""
        queries, positives = items.chunk(2)
        everyone = gather_with_gradient(queries), gather_with_gradient(positives)
        index = self._rank * len(queries) + torch.arange(len(queries), device=items.device)
        negatives = torch.ones(len(queries), len(everyone[0]), dtype=torch.bool, device=items.device)
        sides: list[tuple[Tensor, Tensor]] = [(queries, everyone[1])]
        if self._agcl.bidirectional:
            sides.append((positives, everyone[0]))
        losses = [
            contrast(own, all_, index, temperature=self._agcl.temperature, negatives=negatives) for own, all_ in sides
        ]
        return torch.stack(losses).mean() / len(queries)

    def _both_ways(self, images: Tensor, texts: Tensor, there: list[bool], codes: Tensor) -> Tensor:
        """Images look for their texts and texts for their images, over those that have both.

        Args:
            images: [n, D] of this worker.
            texts: [n, D] of this worker.
            there: which rows have both.
            codes: [n] rows of equal codes do not repel one another.
        """
        device = images.device
        present, codes = torch.tensor(there, device=device), codes.to(device)
        all_present, all_codes = gather_plain(present), gather_plain(codes)
        index = (self._rank * len(images) + torch.arange(len(images), device=device))[present]
        negatives = all_present[None] & (all_codes[None] != codes[present][:, None])
        sides = (images, gather_with_gradient(texts)), (texts, gather_with_gradient(images))
        losses = [
            contrast(own[present], all_, index, temperature=self._agcl.temperature, negatives=negatives)
            for own, all_ in sides
        ]
        return torch.stack(losses).mean() * self._world / max(1, int(all_present.sum()))

    def _hard_texts(self, prepared: DualStepInputs, images: Tensor, texts: Tensor) -> Tensor:
        queries = images[: len(prepared.texts)]
        there = torch.tensor([[row.input_ids is not None for row in of_query] for of_query in prepared.texts])
        there &= torch.tensor([[row.pixels is not None] for row in prepared.items[: len(queries)]])
        there = there.to(images.device)
        usable = gather_plain((there[:, 0] & there[:, 1:].any(1)).sum()[None])
        loss = hard_text_loss(queries, texts.reshape(*there.shape, -1), there, temperature=self._agcl.temperature)
        return loss * self._world / max(1, int(usable.sum()))


def _code(phrase: str) -> int:
    """The same number for the same phrase on every worker."""
    return int.from_bytes(hashlib.blake2b(phrase.encode(), digest_size=7).digest(), "big")
