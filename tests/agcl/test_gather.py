"""Gathered candidates on two processes against the whole batch in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing
from torch import distributed as dist

from afmrl_ray.agcl.gather import gather_plain, gather_with_gradient
from afmrl_ray.agcl.loss import weighted_info_nce
from tests.process_group import run_workers

torch.set_num_threads(1)
B, D = 8, 6


def _local_slice_trick(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def _step(gather: Callable[[Tensor], Tensor], rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Loss and parameter gradient of this rank's part of a batch that is the same on all ranks."""
    draw = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(B, D, generator=draw), torch.randn(B, D, generator=draw)
    weight = torch.randn(D, D, generator=draw, requires_grad=True)
    part = slice(rank * B // world, (rank + 1) * B // world)
    own = F.normalize(queries[part] @ weight, dim=1)
    everywhere = gather(F.normalize(candidates[part] @ weight, dim=1))
    loss, _ = weighted_info_nce(own @ everywhere.T, torch.arange(B)[part], temperature=0.1)
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


def _worker(rank: int, world: int, directory: str) -> None:
    found = {}
    for name, gather in (("ours", gather_with_gradient), ("trick", _local_slice_trick)):
        loss, grad = _step(gather, rank, world)
        dist.all_reduce(loss)
        dist.all_reduce(grad)
        found[name] = (loss / world, grad / world)
    codes = gather_plain(torch.tensor([[rank, 10 * rank]]))
    if rank == 0:
        torch.save((found, codes), f"{directory}/found.pt")


def test_two_processes_equal_the_whole_batch_and_the_local_slice_trick_does_not(tmp_path: Path) -> None:
    loss, grad = _step(gather_with_gradient, 0, 1)
    run_workers(_worker, str(tmp_path), world=2)
    found, codes = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found["ours"][0], loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["ours"][1], grad, rtol=0, atol=1e-6)
    assert (found["trick"][1] - grad).norm() / grad.norm() > 0.05
    assert codes.tolist() == [[0, 0], [1, 10]]


def _alone(rank: int, world: int = 0) -> None:
    assert dist.is_initialized() == bool(world)
    x = torch.ones(2, 3, requires_grad=True)
    assert gather_with_gradient(x) is x
    assert not gather_plain(x).requires_grad


def test_one_process_needs_no_collective() -> None:
    # In processes of their own: DeepSpeed keeps hold of the group that an engine of this process joined.
    run_workers(_alone, world=1)
    multiprocessing.spawn(_alone)
