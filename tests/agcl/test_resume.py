"""Stage 1 resumed by fewer workers: adapters and whole models, under every ZeRO stage."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import distributed as dist

from afmrl_ray.agcl.prepare import Preparer
from afmrl_ray.agcl.step import AGCLStep
from afmrl_ray.config import validate
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.fit import seed_step
from tests.agcl.test_step import trainable_encoder, values_of
from tests.process_group import run_workers

CASES = list(itertools.product(range(4), ("lora", "full")))
HALF, STEPS = 2, 4


def train(rank: int, world: int, resume: bool, ref, base: str, folder: str) -> None:
    """All steps of every case, or only the second half from the first one's checkpoint."""
    for stage, kind in CASES:
        config = validate(values_of(adapter={"kind": kind, "r": 4}, workers={"zero_stage": stage}))
        catalogue = ref.open()
        encoder = trainable_encoder(config, base, catalogue)
        engine = Engine(encoder.module, config.agcl.optimizer, steps=STEPS, zero_stage=stage)
        preparer = Preparer(config, catalogue, encoder, None, rank=rank, world=world)
        step_fn = AGCLStep(config.agcl, encoder, preparer, engine, rank=rank, world=world)
        found = {"start": weights(engine)}
        for step in range(STEPS):
            if step == HALF:
                if resume:
                    engine.load(f"{folder}/{stage}-{kind}", location="here", remedy="start again")
                else:
                    engine.save(f"{folder}/{stage}-{kind}")
                found.update(half=weights(engine), moments=moments(engine, stage))
            if step >= HALF or not resume:
                seed_step(0, step, rank)
                step_fn(step)
                engine.step()
        found["end"] = weights(engine)
        if rank == 0:
            torch.save(found, f"{folder}/{stage}-{kind}-{world}.pt")
        dist.barrier()
        engine.close()


def weights(engine: Engine) -> list[torch.Tensor]:
    with engine.whole_parameters():
        return [parameter.detach().clone() for parameter in engine.parameters]


def moments(engine: Engine, stage: int) -> list[torch.Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    names = ("exp_avg", "exp_avg_sq")
    if stage == 0:
        state = engine._engine.optimizer.state
        return [state[parameter][name].clone() for parameter in engine.parameters for name in names]
    return [safe_get_full_optimizer_state(parameter, name) for parameter in engine.parameters for name in names]


@pytest.fixture(scope="module")
def folder(tiny_checkpoints, tiny_catalogue_ref, tmp_path_factory) -> str:
    """Weights of two workers at the start, half-way and at the end, and of one worker resumed half-way."""
    folder = str(tmp_path_factory.mktemp("resume"))
    for world in (2, 1):
        run_workers(train, world == 1, tiny_catalogue_ref, tiny_checkpoints["encoder"], folder, world=world)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("stage", "kind"), CASES)
def test_one_worker_resumes_exactly_from_the_state_of_two(folder, stage, kind):
    two, one = (torch.load(f"{folder}/{stage}-{kind}-{world}.pt") for world in (2, 1))
    for name in ("half", "moments"):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one[name], two[name], strict=True)), name
    assert any(moment.any() for moment in two["moments"])
    compared = (two["start"], one["end"], two["end"])
    start, ours, theirs = (torch.cat([tensor.flatten() for tensor in found]) for found in compared)
    assert (ours - theirs).norm() <= 1e-5 * (theirs - start).norm()
