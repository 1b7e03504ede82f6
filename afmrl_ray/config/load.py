"""Loading and validation of the config: a YAML file and dotted overrides."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from afmrl_ray.config.rar_presets import PRESETS, preset_keys
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
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist([_without_comment(each) for each in overrides]))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OmegaConfBaseException, YAMLError, OSError, TypeError, UnicodeDecodeError) as error:
        # OmegaConf raises OSError and TypeError for YAML that is not a mapping.
        raise ConfigError(f"{path or 'overrides'}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: a config must be a mapping of sections, not a {type(values).__name__}")
    return validate(dict(values), written=_as_written(path, overrides))


def _without_comment(override: str) -> str:
    """An override whose value is taken whole: YAML would end it at ` #`."""
    key, _, value = override.partition("=")
    plain = " #" in value and value.lstrip()[:1] not in ("'", '"', "[", "{")
    return f"{key}={json.dumps(value)}" if plain else override


def _as_written(path: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The tree of a file and overrides with all scalars as the text that was written, which `007` is not read as."""
    import yaml

    tree: Any = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader) if path else {}
    tree = tree if isinstance(tree, dict) else {}
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, field = key.split(".")
        section = tree
        for name in sections:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[field] = value
    return tree


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
    if (preset := changes.get("rar.preset")) is not None:
        # The dump gives every setting; those of a new preset must not be hidden by the old defaults.
        for key in preset_keys(preset) if preset in PRESETS else ():
            if f"rar.{key}" not in changes:
                _without(values["rar"], key)
    return validate(values)


def _without(section: dict[str, Any], key: str) -> None:
    """Remove a dotted key from nested sections."""
    *sections, field = key.split(".")
    for name in sections:
        section = section[name]
    section.pop(field, None)


def validate(values: Mapping[Any, Any], *, written: Mapping[Any, Any] | None = None) -> Config:
    """The typed tree of plain values.

    Args:
        values: numbers and booleans where the field is text are taken as text.
        written: the same tree with scalars as they were written; None = numbers are formatted.

    Raises:
        ConfigError: see `load_config`; the message is one line about the first error.
    """
    return validate_as(Config, values, written=written)


def validate_as(model: type[Checked], values: Any, *, written: Mapping[Any, Any] | None = None) -> Checked:
    """An instance of `model` from plain values (or from an instance); see `validate`.

    Raises:
        ConfigError: see `load_config`; the message is one line about the first error.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        texts = [_text_for(each, written) for each in error.errors()]
        if isinstance(values, Mapping) and any(text is not None for text in texts):
            changed = copy.deepcopy(dict(values))
            for each, text in zip(error.errors(), texts, strict=True):
                if text is not None and not _set(changed, each["loc"], each["input"], text):
                    break
            else:
                return validate_as(model, changed)
        raise ConfigError(_first_error(error, model)) from error


def _text_for(error: Any, written: Mapping[Any, Any] | None) -> str | None:
    """The text that a scalar stands for where a field is text; None for any other error."""
    if error["type"] != "string_type" or not isinstance(error["input"], bool | int | float):
        return None
    place: Any = written
    for key in error["loc"]:
        known = key in place if isinstance(place, Mapping) else isinstance(place, list) and key in range(len(place))
        # Other parts of the location are kinds of a union, which nobody writes.
        place = place[key] if known else place
    if isinstance(place, str):
        return place
    return str(error["input"]).lower() if isinstance(error["input"], bool) else f"{error['input']:g}"


def _set(values: Any, location: Sequence[int | str], old: Any, new: str) -> bool:
    """Replace the value at an error's location; False if it is not there."""
    for key in location:
        inside = key in values if isinstance(values, dict) else isinstance(values, list) and isinstance(key, int)
        if not inside:
            continue
        if values[key] is old or values[key] == old:
            values[key] = new
            return True
        values = values[key]
    return False


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
