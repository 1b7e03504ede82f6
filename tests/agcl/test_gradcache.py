"""GradCache gives the gradient of the plain pass over the same parts, random numbers included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afmrl_ray.agcl.gradcache import RandomState, backward_in_parts

torch.set_num_threads(1)
PARTS = [[4, 1], [0, 3, 5], [2]]
DATA = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))


def encoder(dropout: float) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 9), nn.Dropout(dropout), nn.Tanh(), nn.Linear(9, 4))


def loss(embeddings: torch.Tensor) -> tuple[torch.Tensor, str]:
    logits = embeddings[:3] @ embeddings[3:].T
    return nn.functional.cross_entropy(logits, torch.arange(3)), "stats"


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def whole(dropout: float, parts: list[list[int]]) -> list[torch.Tensor]:
    """All activations at once, with the random numbers of the parts."""
    model = encoder(dropout)
    torch.manual_seed(2)
    embeddings = torch.empty(6, 4)
    for part in parts:
        embeddings = embeddings.index_copy(0, torch.tensor(part), model(DATA[part]))
    loss(embeddings)[0].backward()
    return gradients(model)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("parts", [PARTS, [[0, 1, 2, 3, 4, 5]], [[5, 4, 3, 2, 1, 0]]])
@pytest.mark.parametrize("idle", [0, 2])
def test_gradients_equal_those_of_the_whole_graph(dropout, parts, idle):
    model = encoder(dropout)
    torch.manual_seed(2)
    lasts = []

    def backward(value, last):
        value.backward()
        lasts.append(last)

    stats = backward_in_parts(lambda part: model(DATA[part]), parts, loss, backward, idle=idle)
    assert stats == "stats"
    assert lasts == [False] * (len(lasts) - 1) + [True]
    for ours, theirs in zip(gradients(model), whole(dropout, parts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_without_the_replay_dropout_gives_another_gradient(monkeypatch):
    """The test above would notice: with new random numbers in the second pass the gradient differs."""
    model = encoder(0.5)
    torch.manual_seed(2)
    monkeypatch.setattr(RandomState, "replayed", lambda self: torch.random.fork_rng(enabled=False))
    backward_in_parts(lambda part: model(DATA[part]), PARTS, loss, lambda value, last: value.backward())
    expected = whole(0.5, PARTS)
    assert any((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(gradients(model), expected, strict=True))


def test_only_one_part_is_held_at_a_time():
    model = encoder(0.0)
    alive, most = 0, 0

    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal alive, most
            if ctx.needs_input_grad[0]:
                alive += len(x)
                most = max(most, alive)
                ctx.rows = len(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            nonlocal alive
            alive -= ctx.rows
            return grad

    def encode(rows):
        return Held.apply(model(DATA[rows]))

    backward_in_parts(encode, PARTS, loss, lambda value, last: value.backward())
    assert (alive, most) == (0, 3)
