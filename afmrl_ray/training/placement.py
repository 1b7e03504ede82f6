"""Placement of a pool's actors: resources for all of them are reserved at once, on the configured nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afmrl_ray.config.cluster import PoolConfig
from afmrl_ray.errors import ResourceError
from afmrl_ray.training.cluster import format_resources, pool_demand


class ActorPlacement:
    """A placement group for a pool's actors, held until `close`; none with `placement.strategy: default`.

    Args:
        name: of the pool's setting, such as `rar.reward.pool`; also of the placement group.
        pool: the pool.

    Raises:
        ResourceError: the resources were not available within `placement.timeout_s`.
    """

    def __init__(self, name: str, pool: PoolConfig) -> None:
        self._pool, self._group = pool, None
        if pool.placement.strategy != "default":
            self._group = _reserve(name, pool)

    def options(self, index: int) -> dict[str, Any]:
        """Options of `ray.remote` for actor number `index`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        placement = self._pool.placement
        options: dict[str, Any] = {"num_cpus": self._pool.cpus_per_worker, "num_gpus": self._pool.gpus_per_worker}
        if placement.resources:
            options["resources"] = dict(placement.resources)
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=index
            )
        elif placement.labels:
            options["label_selector"] = dict(placement.labels)
        return options

    def close(self) -> None:
        """Remove the placement group; actors that still run in it are killed."""
        from ray.util import remove_placement_group

        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _reserve(name: str, pool: PoolConfig) -> Any:
    from ray.util import placement_group, remove_placement_group

    placement = pool.placement
    bundle = {resource: amount for resource, amount in pool_demand(pool).each.items() if amount}
    group = placement_group(
        [bundle] * pool.num_workers,
        strategy=placement.strategy.upper(),
        name=name,
        bundle_label_selector=[dict(placement.labels)] * pool.num_workers if placement.labels else None,
    )
    if not group.wait(placement.timeout_s):
        remove_placement_group(group)
        raise ResourceError(
            f"{name}: no resources for {pool.num_workers} actors with {format_resources(bundle)} each"
            f"{_labelled(placement.labels)}, placement {placement.strategy}, within placement.timeout_s "
            f"{placement.timeout_s:g} s. {_format_nodes()}"
        )
    return group


def _labelled(labels: Mapping[str, str]) -> str:
    return f" on nodes labelled {_format_labels(labels)}" if labels else ""


def _format_nodes() -> str:
    """Resources and labels of the cluster's nodes, as a sentence."""
    import ray

    free = ray.available_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    shown = []
    for node in nodes:
        resources = {
            name: amount
            for name, amount in node["Resources"].items()
            if not name.startswith("node:") and name not in ("memory", "object_store_memory")
        }
        labels = {name: value for name, value in node["Labels"].items() if name != "ray.io/node-id"}
        shown.append(f"{format_resources(resources)}{f' ({_format_labels(labels)})' if labels else ''}")
    unused = {name: free.get(name, 0.0) for name in ("CPU", "GPU")}
    return f"The cluster has {len(nodes)} nodes: {'; '.join(shown)}. Unused: {format_resources(unused, zeros=True)}"


def _format_labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())
