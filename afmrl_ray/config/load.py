"""From a YAML file and dotted overrides to a validated tree."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from afmrl_ray.config.root import Config
from afmrl_ray.errors import ConfigError

_TAGS = {"retrieval", "labels", "column", "openai", "model"}
"""Kinds of protocols and teachers, which pydantic puts into the place of an error."""


Checked = TypeVar("Checked", bound=BaseModel)


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
        if "=" not in override or override.startswith(("-", "[")):
            raise ConfigError(f"{override!r} is not an override; write section.field=value")
    try:
        tree = OmegaConf.load(Path(path)) if path else OmegaConf.create({})
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OmegaConfBaseException, YAMLError, OSError, TypeError, UnicodeDecodeError) as error:
        # OmegaConf raises OSError and TypeError for YAML that is no mapping.
        raise ConfigError(f"{path or 'overrides'}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: a config is a mapping of sections, this is a {type(values).__name__}")
    return validate(dict(values))


def with_values(config: Config, changes: Mapping[str, Any]) -> Config:
    """A config with values at dotted keys changed, validated again.

    Raises:
        ConfigError: see `load_config`.
    """
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        *sections, field = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[field] = value
    return validate(values)


def validate(values: Mapping[Any, Any]) -> Config:
    """Turn plain values into the typed tree.

    Raises:
        ConfigError: see `load_config`; only the first error is told, in one line.
    """
    return validate_as(Config, values)


def validate_as(model: type[Checked], values: Any) -> Checked:
    """Plain values, or the model itself, as a model.

    Raises:
        ConfigError: see `load_config`; only the first error is told, in one line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_error(error, model)) from error


def dump_yaml(config: Config) -> str:
    """The resolved tree as YAML; reading it back gives the same tree."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _first_error(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    key = ".".join(_written(first["loc"]))
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, list(known_keys(model)), n=1, cutoff=0.0)
        return f"unknown config key {key!r}; the nearest known key is {nearest[0]!r}"
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"{key}: {message} (got {first['input']!r})" if key and first["type"] != "value_error" else _plain(key, message)
    )


def _written(location: Sequence[int | str]) -> list[str]:
    """The keys of an error's place as a user writes them: without positions in a list and without kinds."""
    before: Sequence[int | str] = ("", *location)
    return [
        part
        for part, previous in zip(location, before, strict=False)
        if isinstance(part, str) and not (part in _TAGS and (isinstance(previous, int) or previous == "teacher"))
    ]


def _plain(key: str, message: str) -> str:
    return f"{key}: {message}" if key else message


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields below `model`, sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys.extend(key for key in known_keys(section, f"{prefix}{name}.") if key not in keys)
    return keys


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models inside a field's type: itself, or those of an optional, a union or a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
