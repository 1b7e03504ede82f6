from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import nn

from afmrl_ray.config.models import OptimizerConfig
from afmrl_ray.training.engine import Engine, schedule_factor
from tests.process_group import run_workers

OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="linear", warmup_ratio=0.25, max_grad_norm=0.5)


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
            engine.load(folder, location="here", remedy="start again")
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


class Scaled(nn.Module):
    """Its gradient is its input, so every step of Adam moves each weight by the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.frozen = nn.Parameter(torch.rand(5, 7, generator=drawn), requires_grad=False)
        self.weight = nn.Parameter(1.2 + 0.7 * torch.rand(5, 7, generator=drawn))

    def forward(self, signs: torch.Tensor) -> torch.Tensor:
        return (self.weight * signs).sum() + self.frozen.sum()


TINY_STEP, TINY_STEPS, SIGNS = 1e-3, 20, torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).sign()
SAVED_AFTER = 3
"""Steps that together are less than half of what bfloat16 resolves between 1 and 2."""


def train_by_tiny_steps(rank: int, world: int, stage: int, folder: str) -> None:
    constant = OptimizerConfig(learning_rate=TINY_STEP, schedule="constant", warmup_ratio=0.0, max_grad_norm=0.0)

    def fresh() -> tuple[Scaled, Engine]:
        net = Scaled().bfloat16()
        return net, Engine(net, constant, steps=TINY_STEPS, zero_stage=stage, bf16=True)

    net, engine = fresh()
    for step in range(TINY_STEPS):
        if step == SAVED_AFTER:
            engine.save(folder)
            dist.barrier()
            engine.close()
            net, engine = fresh()
            engine.load(folder, location="here", remedy="start again")
        for last in (False, True):
            engine.backward(engine(SIGNS.bfloat16()) / 2, last=last)
        norm = engine.step()["grad_norm"]
    with engine.whole_parameters():
        if rank == 0:
            torch.save((net.weight.detach().clone(), net.frozen.detach().clone(), norm), f"{folder}/weights.pt")


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 2), (2, 3)])
@pytest.mark.timeout(180)
def test_in_bfloat16_steps_below_its_resolution_add_up_and_survive_a_checkpoint(tmp_path, world, stage):
    run_workers(train_by_tiny_steps, stage, str(tmp_path), world=world)
    net = Scaled().bfloat16()
    start = net.weight.detach()
    lost = (start - TINY_STEP * SAVED_AFTER * SIGNS).bfloat16()
    assert torch.equal(lost, start), "the checkpoint's weights would round to something already"
    found, frozen, norm = torch.load(tmp_path / "weights.pt")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (start.float() - TINY_STEP * TINY_STEPS * SIGNS).bfloat16())
    assert torch.equal(frozen, net.frozen)
    assert norm == pytest.approx(SIGNS.numel() ** 0.5, rel=1e-5)


def test_schedules():
    linear = schedule_factor(OptimizerConfig(schedule="linear", warmup_ratio=0.2), 10)
    assert [linear(step) for step in range(3)] == [0.5, 1.0, 1.0]
    assert linear(9) == pytest.approx(1 / 8)
    cosine = schedule_factor(OptimizerConfig(schedule="cosine", warmup_ratio=0.0), 10)
    assert cosine(0) == 1.0
    assert cosine(5) == pytest.approx(0.5)
    constant = schedule_factor(OptimizerConfig(schedule="constant", warmup_ratio=0.5), 4)
    assert [constant(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
