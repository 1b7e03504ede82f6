"""From a YAML file and dotted overrides to a validated tree."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from afmrl_ray.config.root import Config
from afmrl_ray.errors import ConfigError


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (YAML), apply `key.sub=value` overrides in order, validate.

    Raises:
        ConfigError: the file is missing or not YAML, an override is not `key=value`, a key is unknown (the nearest
            known one is named), or a value is of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"{override!r} is not an override; write section.field=value")
    try:
        tree = OmegaConf.load(Path(path)) if path else OmegaConf.create({})
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OmegaConfBaseException, YAMLError, IsADirectoryError) as error:
        raise ConfigError(f"{path or 'overrides'}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: a config is a mapping of sections, this is a {type(values).__name__}")
    return validate(dict(values))


def validate(values: Mapping[Any, Any]) -> Config:
    """Turn plain values into the typed tree.

    Raises:
        ConfigError: see `load_config`; only the first error is told, in one line.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_error(error)) from error


def dump_yaml(config: Config) -> str:
    """The resolved tree as YAML; reading it back gives the same tree."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, list(known_keys(Config)), n=1, cutoff=0.0)
        return f"unknown config key {key!r}; the nearest known key is {nearest[0]!r}"
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"{key}: {message} (got {first['input']!r})" if key and first["type"] != "value_error" else _plain(key, message)
    )


def _plain(key: str, message: str) -> str:
    return f"{key}: {message}" if key else message


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields below `model`, sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys.extend(known_keys(candidate, f"{prefix}{name}."))
    return keys
