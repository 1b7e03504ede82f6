from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import nn

from afmrl_ray.config.models import OptimizerConfig
from afmrl_ray.training.engine import Engine, schedule_factor
from tests.process_group import run_workers

OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="linear", warmup_share=0.25, gradient_clip=0.5)


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    net[0].requires_grad_(False)
    return net


def data() -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def reference(steps: int) -> list[torch.Tensor]:
    """Plain torch: the whole batch at once."""
    net = model()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * [1, 1, 2 / 3, 1 / 3][step]
        optimizer.zero_grad()
        net(data()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def train(rank: int, world: int, stage: int, cut: int, folder: str, resume: bool) -> None:
    net = model()
    engine = Engine(net, OPTIMIZER, steps=4, zero_stage=stage)
    own = data().chunk(world)[rank]
    for step in range(4):
        if resume and step == 2:
            engine.save(folder)
            dist.barrier()
            engine.close()
            net = model()
            engine = Engine(net, OPTIMIZER, steps=4, zero_stage=stage)
            engine.load(folder)
        parts = own.chunk(cut)
        for index, part in enumerate(parts):
            engine.backward(engine(part).square().sum() / len(own), last=index + 1 == len(parts))
        engine.step()
    with engine.whole_parameters():
        if rank == 0:
            torch.save([p.detach().clone() for p in net.parameters()], f"{folder}/weights.pt")


@pytest.mark.parametrize(
    ("world", "stage", "cut", "resume"),
    [(1, 0, 1, False), (1, 1, 3, False), (2, 0, 3, True), (2, 1, 3, False), (2, 2, 2, True), (2, 3, 2, False)],
)
@pytest.mark.timeout(120)
def test_cut_workers_stages_and_resume_give_the_weights_of_plain_torch(tmp_path, world, stage, cut, resume):
    run_workers(train, stage, cut, str(tmp_path), resume, world=world)
    for ours, theirs in zip(torch.load(tmp_path / "weights.pt"), reference(4), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


TINY_RATE, TINY_STEPS = 1e-3, 20


def creep(rank: int, world: int, stage: int, resume: bool, folder: str) -> None:
    """Many steps of Adam on weights between 1 and 2, each an eighth of what is between two neighbours in bfloat16.

    Weights and inputs are positive, so every gradient is positive and every step is the learning rate.
    """
    settings = OptimizerConfig(learning_rate=TINY_RATE, schedule="constant", warmup_share=0.0, gradient_clip=0.0)

    def start() -> tuple[nn.Module, Engine]:
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 1)).requires_grad_(True)
        net[0].requires_grad_(False)
        drawn = torch.Generator().manual_seed(0)
        for parameter in net.parameters():
            parameter.data = (1.2 + 0.7 * torch.rand(parameter.shape, generator=drawn)).bfloat16()
        if rank == 0:
            torch.save([p.detach().clone() for p in net.parameters()], f"{folder}/start.pt")
        return net, Engine(net, settings, steps=TINY_STEPS, zero_stage=stage, bf16=True)

    net, engine = start()
    for step in range(TINY_STEPS):
        if resume and step == 3:  # what was gone until now is less than half of what bfloat16 resolves
            engine.save(folder)
            dist.barrier()
            engine.close()
            net, engine = start()
            engine.load(folder)
        for last in (False, True):
            engine.backward(engine(torch.ones(2, 6, dtype=torch.bfloat16)).float().mean(), last=last)
        engine.step()
    with engine.whole_parameters():
        if rank == 0:
            torch.save([p.detach().clone() for p in net.parameters()], f"{folder}/weights.pt")


@pytest.mark.parametrize(
    ("world", "stage", "resume"), [(1, 0, True), (1, 1, True), (1, 2, True), (1, 3, True), (2, 0, False), (2, 2, True)]
)
@pytest.mark.timeout(120)
def test_in_bfloat16_steps_below_its_resolution_add_up(tmp_path, world, stage, resume):
    run_workers(creep, stage, resume, str(tmp_path), world=world)
    start, ours = torch.load(tmp_path / "start.pt"), torch.load(tmp_path / "weights.pt")
    assert {weights.dtype for weights in ours} == {torch.bfloat16}
    assert all(torch.equal(weights, (weights.float() - TINY_RATE).bfloat16()) for weights in start), "steps too large"
    frozen = 2
    for index, (first, weights) in enumerate(zip(start, ours, strict=True)):
        moved = 0.0 if index < frozen else TINY_RATE * TINY_STEPS
        assert torch.equal(weights, (first.float() - moved).bfloat16())


def test_schedules():
    linear = schedule_factor(OptimizerConfig(schedule="linear", warmup_share=0.2), 10)
    assert [linear(step) for step in range(3)] == [0.5, 1.0, 1.0]
    assert linear(9) == pytest.approx(1 / 8)
    cosine = schedule_factor(OptimizerConfig(schedule="cosine", warmup_share=0.0), 10)
    assert cosine(0) == 1.0
    assert cosine(5) == pytest.approx(0.5)
    constant = schedule_factor(OptimizerConfig(schedule="constant", warmup_share=0.5), 4)
    assert [constant(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
