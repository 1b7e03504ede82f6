"""Loading and validation of the config: a YAML file and dotted overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from afmrl_ray.config.root import Config
from afmrl_ray.errors import ConfigError

_KINDS = {"retrieval", "labels", "column", "openai", "model"}
"""Kinds of protocols and teachers, which pydantic includes in the location of an error."""


Checked = TypeVar("Checked", bound=BaseModel)


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (YAML), apply overrides in order, and validate.

    Args:
        path: YAML file; none = defaults.
        overrides: `section.field=value`.

    Raises:
        ConfigError: the file is missing or not YAML, an override is not `key=value`, a key is unknown (the message
            names the nearest known key), or a value has the wrong type or is out of range.
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
        # OmegaConf raises OSError and TypeError for YAML that is not a mapping.
        raise ConfigError(f"{path or 'overrides'}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: a config must be a mapping of sections, not a {type(values).__name__}")
    return validate(dict(values))


def with_values(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of a config with other values at the given dotted keys, validated.

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
    """The typed tree of plain values.

    Raises:
        ConfigError: see `load_config`; the message is one line about the first error.
    """
    return validate_as(Config, values)


def validate_as(model: type[Checked], values: Any) -> Checked:
    """An instance of `model` from plain values (or from an instance).

    Raises:
        ConfigError: see `load_config`; the message is one line about the first error.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_error(error, model)) from error


def dump_yaml(config: Config) -> str:
    """The resolved tree as YAML; loading it gives the same tree."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _first_error(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    key = ".".join(_user_keys(first["loc"]))
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, list(known_keys(model)), n=1, cutoff=0.0)
        return f"unknown config key {key!r}; the nearest known key is {nearest[0]!r}"
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"{key}: {message} (got {first['input']!r})" if key and first["type"] != "value_error" else _plain(key, message)
    )


def _user_keys(location: Sequence[int | str]) -> list[str]:
    """The keys of an error's location as a user writes them: without list indices and without kinds."""
    before: Sequence[int | str] = ("", *location)
    return [
        part
        for part, previous in zip(location, before, strict=False)
        if isinstance(part, str) and not (part in _KINDS and (isinstance(previous, int) or previous == "teacher"))
    ]


def _plain(key: str, message: str) -> str:
    return f"{key}: {message}" if key else message


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields of `model`, including sections and their fields."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys.extend(key for key in known_keys(section, f"{prefix}{name}.") if key not in keys)
    return keys


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models in a field's type: the type itself, or those in an optional, a union or a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]
