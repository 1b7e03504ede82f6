"""Workers of a gloo process group, each in a fresh process."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

import torch
from torch import distributed as dist
from torch import multiprocessing


def run_workers(work: Callable[..., None], *args: object, world: int) -> None:
    """Call `work(rank, world, *args)` in `world` processes that joined one group; raise what any of them raises."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_run, args=(world, port, work, args), nprocs=world)


def _run(rank: int, world: int, port: int, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo", rank=rank, world_size=world)
    work(rank, world, *args)
    dist.barrier()
    dist.destroy_process_group()
    # Engines keep groups alive whose threads may still hold a tensor: freed while the interpreter is torn down, it
    # aborts the process ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
