"""Catalogue rows through a pool of Ray Data actors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from afmrl_ray.config.cluster import PoolConfig


def map_rows(actor: type, columns: Mapping[str, np.ndarray], *, pool: PoolConfig, arguments: dict[str, Any]) -> Any:
    """Send rows in batches through `pool.num_workers` actors and collect what they return.

    Args:
        actor: class whose constructor takes `arguments` and `threads`, and whose call takes a batch of `columns` with
            `place`, a row's number, and returns columns of the same length, `place` among them.
        columns: [N] integers each.

    Returns:
        pandas DataFrame with the columns of the actor, in the order of the rows.
    """
    import ray.data

    count = len(next(iter(columns.values())))
    blocks = min(count, max(1, -(-count // pool.batch_size)))
    items = [
        {"place": place, **{name: int(values[place]) for name, values in columns.items()}} for place in range(count)
    ]
    dataset = ray.data.from_items(items, override_num_blocks=blocks)
    table = dataset.map_batches(
        actor,
        batch_size=pool.batch_size,
        compute=ray.data.ActorPoolStrategy(size=pool.num_workers),
        fn_constructor_kwargs={**arguments, "threads": max(1, int(pool.cpus_per_worker))},
        num_cpus=pool.cpus_per_worker,
        num_gpus=pool.gpus_per_worker or None,
        **_placed(pool),
    ).to_pandas()
    return table.sort_values("place", ignore_index=True)


def _placed(pool: PoolConfig) -> dict[str, Any]:
    """What Ray Data is told of `pool.placement`; its pools grow one by one, so both ways to spread are one."""
    placement = pool.placement
    options: dict[str, Any] = {}
    if placement.resources:
        options["resources"] = dict(placement.resources)
    if placement.labels:
        options["label_selector"] = dict(placement.labels)
    if placement.strategy.endswith("spread"):
        options["scheduling_strategy"] = "SPREAD"
    return options
