"""Catalogue rows through a pool of Ray Data actors."""

from __future__ import annotations

from typing import Any

import numpy as np

from afmrl_ray.config.cluster import PoolConfig


def map_rows(actor: type, rows: np.ndarray, *, pool: PoolConfig, arguments: dict[str, Any]) -> Any:
    """Send `rows` in batches through `pool.num_workers` actors and collect what they return.

    Args:
        actor: class whose constructor takes `arguments` and `threads`, and whose call takes a batch with column `row`
            and returns columns of the same length, `row` among them.
        rows: [N] catalogue rows, each once.

    Returns:
        pandas DataFrame with the columns of the actor, in the order of `rows`.
    """
    import ray.data

    blocks = min(len(rows), max(1, -(-len(rows) // pool.batch_size)))
    dataset = ray.data.from_items([{"row": int(row)} for row in rows], override_num_blocks=blocks)
    table = dataset.map_batches(
        actor,
        batch_size=pool.batch_size,
        compute=ray.data.ActorPoolStrategy(size=pool.num_workers),
        fn_constructor_kwargs={**arguments, "threads": max(1, int(pool.cpus_per_worker))},
        num_cpus=pool.cpus_per_worker,
        num_gpus=pool.gpus_per_worker or None,
    ).to_pandas()
    return table.set_index("row").loc[rows].reset_index()
