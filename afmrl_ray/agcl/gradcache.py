"""GradCache: contrastive gradients of a large batch in the memory of a small one.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (RepL4NLP 2021). The loss
needs all embeddings at once, but the encoder does not: embed part by part without gradient, compute the gradient of the
loss at the embeddings, then embed each part again and backpropagate its part of that gradient through the encoder. The
second pass repeats the random numbers of the first, since with others dropout would change the embeddings.
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
    """Backward pass of `loss(encode(all inputs))`, holding the activations of one part at a time.

    One part without idle passes is the plain forward and backward pass.

    Args:
        encode: indices of inputs to their embeddings [n, D].
        parts: indices 0 to B - 1, each in exactly one part.
        loss: embeddings [B, D] in the order of the indices to a scalar and statistics; it may depend on parameters
            through the embeddings only.
        backward: takes a scalar whose gradient is to be added, and whether it is the last of the step.
        idle: additional passes without effect, for a worker with fewer parts than another: with sharded parameters
            every pass makes collective calls that need all workers.

    Returns:
        The statistics that `loss` returned.
    """
    if len(parts) == 1 and not idle:
        value, stats = loss(_in_order(encode(parts[0]), parts))
        backward(value, True)
        return stats
    passes = [*parts, *[[0]] * idle]
    states, pieces = [], []
    for number, part in enumerate(passes):
        states.append(RandomState())
        with torch.set_grad_enabled(number + 1 == len(passes)):
            pieces.append(encode(part))
    last_piece = pieces[-1]
    embeddings = _in_order(torch.cat([piece.detach() for piece in pieces[: len(parts)]]), parts).requires_grad_()
    value, stats = loss(embeddings)
    (gradient,) = torch.autograd.grad(value, embeddings)

    def backpropagate(number: int, piece: Tensor, last: bool) -> None:
        if number >= len(parts):
            return backward(piece.sum() * 0, last)
        wanted = gradient[torch.tensor(parts[number], device=gradient.device)]
        # The inner product with a constant has exactly this constant as its gradient at the embeddings.
        return backward((piece * wanted).sum(), last)

    del pieces
    # The last pass kept its activations, so it needs no second forward pass.
    backpropagate(len(passes) - 1, last_piece, False)
    del last_piece
    for number, (part, state) in enumerate(zip(passes[:-1], states[:-1], strict=True)):
        with state.replayed():
            piece = encode(part)
        backpropagate(number, piece, number + 2 == len(passes))
    return stats


def _in_order(embeddings: Tensor, parts: Sequence[list[int]]) -> Tensor:
    """The concatenated embeddings of the parts, in the order of their indices."""
    return embeddings[torch.tensor([index for part in parts for index in part]).argsort().to(embeddings.device)]


class RandomState:
    """State of the random generators at construction, on the CPU and on the current CUDA device if there is one."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside the context, repeat the random numbers that followed construction; outside nothing changes."""
        devices = [torch.cuda.current_device()] if self._cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda)
            yield
