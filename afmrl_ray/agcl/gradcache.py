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
    for index, rows in enumerate(passes):
        states.append(RandomState())
        with torch.set_grad_enabled(index + 1 == len(passes)):
            pieces.append(encode(rows))
    kept = pieces[-1]
    embeddings = _in_order(torch.cat([piece.detach() for piece in pieces[: len(parts)]]), parts).requires_grad_()
    value, stats = loss(embeddings)
    (gradient,) = torch.autograd.grad(value, embeddings)

    def send_back(index: int, piece: Tensor, last: bool) -> None:
        if index >= len(parts):
            return backward(piece.sum() * 0, last)
        wanted = gradient[torch.tensor(parts[index], device=gradient.device)]
        # The inner product with a constant has exactly this constant as its gradient at the embeddings.
        return backward((piece * wanted).sum(), last)

    del pieces
    send_back(len(passes) - 1, kept, False)
    del kept
    for index, (rows, state) in enumerate(zip(passes[:-1], states[:-1], strict=True)):
        with state.replayed():
            piece = encode(rows)
        send_back(index, piece, index + 2 == len(passes))
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
