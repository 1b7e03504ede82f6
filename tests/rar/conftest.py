from __future__ import annotations

import pytest

from afmrl_ray.config.models import AdapterConfig, GeneratorConfig
from afmrl_ray.rar.module import PolicySpec

PICTURE = {"min_pixels": 784, "max_pixels": 3136}


@pytest.fixture(scope="session")
def policy_spec(tiny_checkpoints, tiny_catalogue_ref) -> PolicySpec:
    return PolicySpec(
        start=tiny_checkpoints["generator"],
        generator=GeneratorConfig(picture=PICTURE, max_new_tokens=10, max_attributes=12),
        adapter=AdapterConfig(kind="full"),
        catalogue=tiny_catalogue_ref,
        temperature=1.0,
        with_reference=True,
        seed=0,
    )
