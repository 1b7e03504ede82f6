"""The typed config tree; imports neither torch nor ray."""

from __future__ import annotations

from afmrl_ray.config.load import dump_yaml, known_keys, load_config, validate, with_values
from afmrl_ray.config.root import Config

__all__ = ["Config", "dump_yaml", "known_keys", "load_config", "validate", "with_values"]
