"""Contrastive gradients of a large batch in the memory of a small one.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (RepL4NLP 2021). The loss
needs all embeddings at once, but the encoder does not: embed part by part without gradient, take the gradient of the
loss at the embeddings, then embed each part again and send its share of that gradient through the encoder. The second
pass repeats the random draws of the first, otherwise dropout would make the gradient that of another forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

Stats = TypeVar("Stats")


def backward_in_parts(
    encode: Callable[[list[int]], Tensor],
    parts: Sequence[list[int]],
    loss: Callable[[Tensor], tuple[Tensor, Stats]],
    backward: Callable[[Tensor, bool], None],
    *,
    idle: int = 0,
) -> Stats:
    """Backward pass of `loss(encode(all rows))`, holding the activations of one part at a time.

    One part without idle passes is the plain forward and backward pass.

    Args:
        encode: rows to their embeddings [len(rows), D].
        parts: row numbers 0 to B - 1, each in exactly one part.
        loss: embeddings [B, D] in the order of rows to a scalar and what is to be returned; parameters must reach it
            through the embeddings only.
        backward: takes a scalar whose gradient is to be added, and whether it is the last of the step.
        idle: passes that count for nothing, for a worker that has fewer parts than another, since the collective calls
            of sharded parameters need every worker in every pass.

    Returns:
        What `loss` returned beside the scalar.
    """
    if len(parts) == 1 and not idle:
        value, stats = loss(_in_order(encode(parts[0]), parts))
        backward(value, True)
        return stats
    passes = [*parts, *[[0]] * idle]
    states, pieces = [], []
    with torch.no_grad():
        for rows in passes:
            states.append(RandomState())
            pieces.append(encode(rows))
    device = pieces[0].device
    embeddings = _in_order(torch.cat(pieces[: len(parts)]), parts).requires_grad_()
    value, stats = loss(embeddings)
    (gradient,) = torch.autograd.grad(value, embeddings)
    for index, (rows, state) in enumerate(zip(passes, states, strict=True)):
        with state.replayed():
            piece = encode(rows)
        wanted = gradient[torch.tensor(rows, device=device)]
        # The inner product with a constant has exactly this constant as its gradient at the embeddings.
        surrogate = (piece * wanted).sum() if index < len(parts) else piece.sum() * 0
        backward(surrogate, index + 1 == len(passes))
    return stats


def _in_order(embeddings: Tensor, parts: Sequence[list[int]]) -> Tensor:
    """The concatenated embeddings of the parts in the order of rows."""
    return embeddings[torch.tensor([row for rows in parts for row in rows]).argsort().to(embeddings.device)]


class RandomState:
    """The generators' state at the time of construction, on CPU and, where there is one, the current CUDA device."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw inside as was drawn then; outside nothing changes."""
        devices = [torch.cuda.current_device()] if self._cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda)
            yield
