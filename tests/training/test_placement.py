"""Placement groups of pools: reserved at once, removed, and an error if resources are missing."""

from __future__ import annotations

import pytest

from afmrl_ray.config.cluster import PlacementConfig, PoolConfig
from afmrl_ray.errors import ResourceError
from afmrl_ray.training.placement import ActorPlacement

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def pool(count: int, **placement: object) -> PoolConfig:
    settings = PlacementConfig.model_validate({"timeout_s": 2, **placement})
    return PoolConfig(num_workers=count, cpus_per_worker=0.2, placement=settings)


def groups() -> list[str]:
    from ray.util import placement_group_table

    return [group["name"] for group in placement_group_table().values() if group["state"] == "CREATED"]


def test_actors_run_in_one_placement_group_which_close_removes(ray_local: None) -> None:
    import ray

    class Actor:
        def group(self) -> str:
            return ray.util.get_current_placement_group().id.hex()

    placement = ActorPlacement("rar.reward.pool", pool(2, strategy="pack"))
    assert groups() == ["rar.reward.pool"]
    actors = [ray.remote(**placement.options(index))(Actor).remote() for index in range(2)]
    assert len(set(ray.get([actor.group.remote() for actor in actors]))) == 1
    for actor in actors:
        ray.kill(actor)
    placement.close()
    assert groups() == []


def test_missing_resources_are_an_error_that_lists_the_available_ones(ray_local: None) -> None:
    with pytest.raises(ResourceError) as error:
        ActorPlacement("rar.reward.pool", pool(2, strategy="strict_spread", labels={"afmrl/role": "reward"}))
    message = str(error.value)
    assert "rar.reward.pool: no resources for 2 actors with 0.2 CPU each on nodes labelled afmrl/role=reward" in message
    assert "strict_spread, within placement.timeout_s 2 s" in message
    assert "The cluster has 1 nodes: " in message
    assert groups() == []


def test_without_a_strategy_labels_and_resources_are_passed_to_ray() -> None:
    options = ActorPlacement("pool", pool(1, labels={"afmrl/role": "data"}, resources={"reward_slot": 1})).options(0)
    assert options == {
        "num_cpus": 0.2,
        "num_gpus": 0,
        "resources": {"reward_slot": 1},
        "label_selector": {"afmrl/role": "data"},
    }
