"""A run small enough for tests: every stage real, nothing learned well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afmrl_ray.config import Config, validate

IMAGE = {"min_pixels": 3136, "max_pixels": 3136}


def run_values(storage_path: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": {"name": "t", "storage_path": str(storage_path)},
        "catalogue": {"cache_dir": str(storage_path / "staging")},
        "synthetic": {"preset": "tiny", "image_px": 56},
        "tiny": {
            "hidden_size": 64,
            "num_layers": 2,
            "vision_width": 32,
            "vision_depth": 2,
            "patch_px": 14,
            "encoder_pretrain_steps": 2,
            "generator_pretrain_steps": 40,
            "pretrain_products": 30,
            "pretrain_batch_size": 16,
        },
        "encoder": {"image": IMAGE, "vision_cache": {"enabled": True, "folder": str(storage_path / "vision")}},
        "generator": {"image": IMAGE, "max_new_tokens": 64, "max_attributes": 12},
        "distill": {
            "steps": 160,
            "batch_size": 16,
            "optimizer": {"learning_rate": 5e-3},
            "workers": {"checkpoint_every": 80},
        },
        "annotate": {"pool": {"batch_size": 128}},
        "agcl": {
            "steps": 6,
            "batch_size": 8,
            "optimizer": {"learning_rate": 1e-3},
            "workers": {"num_workers": 2, "checkpoint_every": 2},
        },
        "rar": {
            "steps": 4,
            "prompts_per_step": 4,
            "group_size": 4,
            "checkpoint_every": 1,
            # Four steps need not improve anything, and the runs must differ from what they start from.
            "keep_best": False,
            "optimizer": {"learning_rate": 1e-4},
            # Scores that are a function of their request alone: the runs are compared to the last bit.
            "reward": {"k": 5, "batch_wait_ms": 0, "cached_scores": 0, "pool": {"cpus_per_worker": 0.5}},
            "rollout": {"pool": {"batch_size": 2, "cpus_per_worker": 0.5}},
        },
        "evaluation": {
            "bootstrap_samples": 50,
            "protocols": [
                {"kind": "retrieval", "name": "fine"},
                {
                    "kind": "labels",
                    "name": "families",
                    "label": "family_id",
                    "fit": {"split": ["test"], "role": "gallery"},
                    "test": {"split": ["test"], "role": "query"},
                },
            ],
        },
        "cit": {"rounds": 1},
    }
    for section, fields in changes.items():
        values[section] = {**values.get(section, {}), **fields}
    return values


@pytest.fixture
def tiny_run(tmp_path: Path) -> Config:
    return validate(run_values(tmp_path))
