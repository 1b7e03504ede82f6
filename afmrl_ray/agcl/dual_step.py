"""One step of a dual tower on one worker: one pass through both towers, then the sum of the objectives."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from afmrl_ray.agcl.dual_loss import contrast, hard_text_loss
from afmrl_ray.agcl.dual_prepare import DualPrepared, DualPreparer
from afmrl_ray.agcl.gather import gather_plain, gather_with_gradient
from afmrl_ray.agcl.prepare import Ahead
from afmrl_ray.config import Config
from afmrl_ray.models.dual_tower import DualProcessor, fuse, placed
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
        self._agcl, self._dual = config.agcl, config.encoder.dual_tower
        self._engine, self._processor = engine, processor
        self._rank, self._world = rank, world
        self._ahead: Ahead[DualPrepared] = Ahead(preparer, config.agcl.steps)

    def __call__(self, step: int) -> dict[str, float]:
        watch = Stopwatch(self._engine.device)
        with watch("data"):
            prepared = self._ahead.take(step)
        rows = [*prepared.listings, *prepared.regions, *[row for texts in prepared.texts for row in texts]]
        with watch("forward"):
            pictures, texts = self._engine(**self._processor.collate(rows, self._engine.device))
            pictures = placed(pictures, [row.pixels is not None for row in rows])
            texts = placed(texts, [row.input_ids is not None for row in rows])
        with watch("loss"):
            losses = self.losses(prepared, pictures, texts)
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

    def losses(self, prepared: DualPrepared, pictures: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """This worker's share of each objective, weighted; averaged over the workers they are those of the batch.

        Args:
            pictures: [rows, D] of listings, regions and texts in this order, zero where a row has no picture.
            texts: [rows, D] the same of texts.
        """
        dual, count = self._dual, len(prepared.listings)
        ends = [count, count + len(prepared.regions)]
        listing = pictures[: ends[0]], texts[: ends[0]]
        found = {}
        if dual.pair_weight:
            found["pair_loss"] = dual.pair_weight * self._pair_loss(fuse(*listing))
        if dual.picture_text_weight:
            there = [row.pixels is not None and row.input_ids is not None for row in prepared.listings]
            found["picture_text_loss"] = dual.picture_text_weight * self._both_ways(
                *listing, there, torch.tensor(prepared.products)
            )
        if dual.region_weight:
            there = [row.pixels is not None for row in prepared.regions]
            place = slice(ends[0], ends[1])
            # Equal phrases are no negatives of one another, wherever their pictures come from.
            codes = torch.tensor([_code(phrase) for phrase in prepared.phrases])
            found["region_loss"] = dual.region_weight * self._both_ways(pictures[place], texts[place], there, codes)
        if dual.hard_text_weight:
            found["hard_text_loss"] = dual.hard_text_weight * self._hard_texts(prepared, listing[0], texts[ends[1] :])
        return found

    def _pair_loss(self, listings: Tensor) -> Tensor:
        """Mean over queries and, as they are looked for too, over positives; a batch holds each product once."""
        queries, positives = listings.chunk(2)
        everyone = gather_with_gradient(queries), gather_with_gradient(positives)
        index = self._rank * len(queries) + torch.arange(len(queries), device=listings.device)
        negatives = torch.ones(len(queries), len(everyone[0]), dtype=torch.bool, device=listings.device)
        sides: list[tuple[Tensor, Tensor]] = [(queries, everyone[1])]
        if self._agcl.bidirectional:
            sides.append((positives, everyone[0]))
        losses = [
            contrast(own, all_, index, temperature=self._agcl.temperature, negatives=negatives) for own, all_ in sides
        ]
        return torch.stack(losses).mean() / len(queries)

    def _both_ways(self, pictures: Tensor, texts: Tensor, there: list[bool], codes: Tensor) -> Tensor:
        """Pictures look for their texts and texts for their pictures, over those that have both.

        Args:
            pictures: [n, D] of this worker.
            texts: [n, D] of this worker.
            there: which rows have both.
            codes: [n] rows of equal codes do not repel one another.
        """
        device = pictures.device
        present, codes = torch.tensor(there, device=device), codes.to(device)
        all_present, all_codes = gather_plain(present), gather_plain(codes)
        index = (self._rank * len(pictures) + torch.arange(len(pictures), device=device))[present]
        negatives = all_present[None] & (all_codes[None] != codes[present][:, None])
        sides = (pictures, gather_with_gradient(texts)), (texts, gather_with_gradient(pictures))
        losses = [
            contrast(own[present], all_, index, temperature=self._agcl.temperature, negatives=negatives)
            for own, all_ in sides
        ]
        return torch.stack(losses).mean() * self._world / max(1, int(all_present.sum()))

    def _hard_texts(self, prepared: DualPrepared, pictures: Tensor, texts: Tensor) -> Tensor:
        queries = pictures[: len(prepared.texts)]
        there = torch.tensor([[row.input_ids is not None for row in of_query] for of_query in prepared.texts])
        there &= torch.tensor([[row.pixels is not None] for row in prepared.listings[: len(queries)]])
        there = there.to(pictures.device)
        usable = gather_plain((there[:, 0] & there[:, 1:].any(1)).sum()[None])
        loss = hard_text_loss(queries, texts.reshape(*there.shape, -1), there, temperature=self._agcl.temperature)
        return loss * self._world / max(1, int(usable.sum()))


def _code(phrase: str) -> int:
    """The same number for the same phrase on every worker."""
    return int.from_bytes(hashlib.blake2b(phrase.encode(), digest_size=7).digest(), "big")
