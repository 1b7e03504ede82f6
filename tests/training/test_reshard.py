"""Resuming with another number of workers: weights and moments are those of a run that was never interrupted."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import distributed as dist
from torch import nn

from afmrl_ray import storage
from afmrl_ray.config.models import OptimizerConfig
from afmrl_ray.errors import CheckpointError
from afmrl_ray.training.checksums import write_checksums
from afmrl_ray.training.engine import Engine, schedule_factor
from tests.process_group import run_workers

OPTIMIZER = OptimizerConfig(learning_rate=0.05, schedule="linear", warmup_ratio=0.25, max_grad_norm=0.5)
WORLDS = (3, 1, 2)
STEPS = 2 * len(WORLDS)
CASES = list(itertools.product(range(4), ("frozen", "full")))


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    # 75 trained numbers, or 124, divide neither by two nor by three times DeepSpeed's alignment.
    net = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 1), nn.Linear(1, 1))
    net[0].requires_grad_(kind == "full")
    return net


def data() -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(1))


def undisturbed(kind: str, *, forget: bool = False) -> list[torch.Tensor]:
    """Plain torch with the whole batch; with `forget` the optimizer starts afresh wherever workers change."""
    net, factor = model(kind), schedule_factor(OPTIMIZER, STEPS)
    trained = [p for p in net.parameters() if p.requires_grad]
    for step in range(STEPS):
        if step == 0 or (forget and step % 2 == 0):
            optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = 0.05 * factor(step)
        optimizer.zero_grad()
        net(data()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def two_steps(rank: int, world: int, first: int, folder: str) -> None:
    for stage, kind in CASES:
        net = model(kind)
        engine = Engine(net, OPTIMIZER, steps=STEPS, zero_stage=stage)
        if first:
            engine.load(f"{folder}/{stage}-{kind}-{first}", location="here", remedy="start again")
        own = data().chunk(world)[rank]
        for _ in range(2):
            engine.backward(engine(own).square().mean())
            engine.step()
        engine.save(f"{folder}/{stage}-{kind}-{first + 2}")
        with engine.whole_parameters():
            if rank == 0:
                torch.save([p.detach().clone() for p in net.parameters()], f"{folder}/{stage}-{kind}.pt")
        dist.barrier()
        engine.close()


def refusals(rank: int, world: int, asked: list[tuple[str, int]], out: str) -> None:
    """Load every folder under a ZeRO stage with one worker, and write the error messages to `out`."""
    messages = []
    for folder, stage in asked:
        engine = Engine(model("full"), OPTIMIZER, steps=STEPS, zero_stage=stage)
        with pytest.raises(CheckpointError) as caught:
            engine.load(folder, location="here", remedy="start again")
        messages.append(str(caught.value))
        engine.close()
    storage.write_json(out, messages)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """Checkpoints and final weights of every case after six steps: two by three workers, two by one, two by two."""
    folder = str(tmp_path_factory.mktemp("reshard"))
    for index, world in enumerate(WORLDS):
        run_workers(two_steps, 2 * index, folder, world=world)
    return folder


def relative_to_update(ours: list[torch.Tensor], theirs: list[torch.Tensor], kind: str) -> float:
    start = torch.nn.utils.parameters_to_vector(model(kind).parameters()).detach()
    ours_flat, theirs_flat = (torch.cat([tensor.flatten() for tensor in found]) for found in (ours, theirs))
    return float((ours_flat - theirs_flat).norm() / (theirs_flat - start).norm())


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_a_change_of_the_number_of_workers_changes_no_weight(trained, stage, kind):
    weights = torch.load(f"{trained}/{stage}-{kind}.pt")
    assert relative_to_update(weights, undisturbed(kind), kind) < 1e-5
    assert relative_to_update(undisturbed(kind, forget=True), undisturbed(kind), kind) > 1e-2, "moments do not matter"


@pytest.mark.timeout(300)
def test_a_checkpoint_holds_the_layout_it_was_written_with(trained):
    assert storage.read_json(f"{trained}/2-full-2/layout.json") == {"world_size": 3, "zero_stage": 2}


@pytest.mark.timeout(300)
def test_a_checkpoint_that_cannot_be_loaded_is_an_error_of_one_line_and_stays_unchanged(trained, tmp_path):
    damaged = {stage: tmp_path / f"damaged-{stage}" for stage in (2, 3)}
    for stage, folder in damaged.items():
        storage.copy_dir(f"{trained}/{stage}-full-2", str(folder))
        (folder / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
        write_checksums(str(folder), rank=1)
    files = [list(storage.list_files(str(folder))) for folder in damaged.values()]
    asked = [(f"{trained}/1-full-2", 2), *((str(folder), stage) for stage, folder in damaged.items())]
    out = str(tmp_path / "messages.json")
    run_workers(refusals, asked, out, world=1)
    stage, *shards = storage.read_json(out)
    assert "written with ZeRO 1" in stage
    assert "set zero_stage=1" in stage
    for message in shards:
        assert "written by 3 workers, cannot be converted for 1" in message
        assert "use 3 workers again" in message
        assert "\n" not in message
    assert [list(storage.list_files(str(folder))) for folder in damaged.values()] == files
