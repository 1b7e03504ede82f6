"""Catalogue rows mapped through a pool of Ray Data actors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from afmrl_ray.config.cluster import PoolConfig
from afmrl_ray.models.threads import torch_threads


def map_rows(actor: type, columns: Mapping[str, np.ndarray], *, pool: PoolConfig, arguments: dict[str, Any]) -> Any:
    """Send rows in batches through `pool.num_workers` actors and collect what they return.

    Args:
        actor: class whose constructor takes `arguments` and `threads`, and whose call takes a batch of `columns` with
            `place`, the position of each row, and returns columns of the same length, `place` among them.
        columns: [N] integers each.
        pool: size and resources of the pool.
        arguments: keyword arguments of the actor's constructor.

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
        fn_constructor_kwargs={**arguments, "threads": torch_threads(pool.cpus_per_worker)},
        num_cpus=pool.cpus_per_worker,
        num_gpus=pool.gpus_per_worker or None,
        **_placement_options(pool),
    ).to_pandas()
    return table.sort_values("place", ignore_index=True)


def _placement_options(pool: PoolConfig) -> dict[str, Any]:
    """`pool.placement` as options of Ray Data, which places actors one by one: both ways to spread are the same."""
    placement = pool.placement
    options: dict[str, Any] = {}
    if placement.resources:
        options["resources"] = dict(placement.resources)
    if placement.labels:
        options["label_selector"] = dict(placement.labels)
    if placement.strategy.endswith("spread"):
        options["scheduling_strategy"] = "SPREAD"
    return options
