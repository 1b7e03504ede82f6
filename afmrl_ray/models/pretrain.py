"""Brief pre-training of a tiny backbone at captioning, so that adapters start from features as with published ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import completion_batch, completion_logprobs
from afmrl_ray.models.model_input import ModelInput


def caption(category: str, attributes: Iterable[tuple[str, str]]) -> str:
    """Category and all attribute values of a product: "mug red striped left-handle blue gold ceramic small"."""
    return " ".join([category, *(value for _, value in attributes)])


def pretrain(
    model: Any,
    processor: ItemProcessor,
    example: Callable[[int], tuple[ModelInput, str]],
    size: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    label: str,
) -> list[float]:
    """Train every weight at captioning.

    Args:
        model: the backbone.
        processor: of its checkpoint.
        example: prompt and caption of example i.
        size: number of examples.
        steps: optimizer steps.
        batch_size: examples per step.
        learning_rate: peak learning rate.
        seed: of the order of examples.
        label: of the progress bar.

    Returns:
        The loss of every step, nats per token.
    """
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1)
    draw = np.random.default_rng(seed)
    losses = []
    for _ in tqdm(range(steps), desc=label, mininterval=5):
        loss = caption_loss(model, processor, [example(int(i)) for i in draw.integers(size, size=batch_size)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def caption_loss(model: Any, processor: ItemProcessor, examples: Sequence[tuple[ModelInput, str]]) -> torch.Tensor:
    """Mean negative log-likelihood per completion token, nats."""
    completions = [processor.completion_ids(text) for _, text in examples]
    batch, mask = completion_batch(
        [prompt for prompt, _ in examples], completions, processor.pad_id, next(model.parameters()).device
    )
    logp = completion_logprobs(model, batch, mask, forbidden_ids=processor.forbidden_ids)
    return -logp.sum() / mask.sum()
