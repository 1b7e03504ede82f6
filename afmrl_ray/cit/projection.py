"""The part of the config that a stage declares, and nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from afmrl_ray.config import Config
from afmrl_ray.config.base import Section

_Fields = dict[str, "dict | None"]
"""Field name to its declared subfields; none = the whole field."""


class UndeclaredReadError(RuntimeError):
    """A stage read a config field that its declaration does not list."""


class ConfigProjection:
    """Gives the declared fields of a config; reading any other one raises. Can be pickled.

    Args:
        config: a config, or a section of one.
        reads: dotted names of fields and sections, such as `agcl` or `annotate.items`; a section stands for all its
            fields.
        reader: name of the stage, for messages.

    Raises:
        ValueError: a name in `reads` is no field.
    """

    def __init__(self, config: Section, reads: Iterable[str], reader: str) -> None:
        self._set(config, _tree(config, reads), reader, "")

    def _set(self, section: Section, fields: _Fields, reader: str, path: str) -> None:
        self.__dict__.update(_section=section, _fields=fields, _reader=reader, _path=path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked up by copy and pickle
            raise AttributeError(name)
        fields: _Fields = self.__dict__["_fields"]
        path, reader = self.__dict__["_path"] + name, self.__dict__["_reader"]
        if name not in fields:
            raise UndeclaredReadError(
                f"stage {reader} reads the config field {path}, which its declaration does not list; add it to `reads`"
            )
        value, inner = getattr(self.__dict__["_section"], name), fields[name]
        if inner is None:
            return value
        nested = object.__new__(ConfigProjection)
        nested._set(value, inner, reader, f"{path}.")
        return nested

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a config is frozen, {name} cannot be set")


def fingerprinted_values(config: Config, reads: Iterable[str]) -> dict[str, Any]:
    """JSON values of the declared fields that can change a result, nested by section; for fingerprints."""
    return _values(config, _tree(config, reads))


def _tree(section: Section, reads: Iterable[str]) -> _Fields:
    tree: _Fields = {}
    for read in reads:
        fields, current = tree, section
        *parents, last = read.split(".")
        for parent in parents:
            _check_field(current, parent, read)
            inner = fields.setdefault(parent, {})
            if inner is None:
                break
            fields, current = inner, getattr(current, parent)
        else:
            _check_field(current, last, read)
            fields[last] = None
    return tree


def _check_field(section: Any, name: str, read: str) -> None:
    if not isinstance(section, Section) or name not in type(section).model_fields:
        raise ValueError(f"{read} is no field of the config")


def _values(section: Section, fields: _Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    whole: Mapping[str, Any] = section.fingerprinted() if None in fields.values() else {}
    for name, inner in fields.items():
        if name in type(section).runtime_only:
            continue
        if inner is not None:
            found[name] = _values(getattr(section, name), inner)
        else:
            # A section may leave out of its fingerprint what its other fields make irrelevant.
            found[name] = whole[name] if name in whole else section.model_dump(mode="json", include={name})[name]
    return found
