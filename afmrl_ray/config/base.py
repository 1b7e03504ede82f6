"""What every section of the config tree is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, and the string under a field is its help text."""

    runtime_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that decide time, memory or patience but no result: changing one never asks for finished work again."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_not_mentioned(cls, values: Any) -> Any:
        """Fill a partly given subsection from the default of its field, which may differ from its class's defaults."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for name, field in cls.model_fields.items():
            given, default = filled.get(name), field.default
            if not (isinstance(given, Mapping) and isinstance(default, Section)):
                continue
            if field.discriminator is None:
                filled[name] = _merged(default.model_dump(exclude_unset=True), given)
            elif field.discriminator not in given:
                # Without a kind, the default kind is meant.
                filled[name] = {field.discriminator: getattr(default, str(field.discriminator)), **given}
        return filled

    def fingerprinted(self) -> dict[str, Any]:
        """JSON values of all fields that can change a result, for fingerprints."""
        dumped = self.model_dump(mode="json", exclude=set(self.runtime_only))
        for name in dumped:
            value = getattr(self, name)
            if isinstance(value, Section):
                dumped[name] = value.fingerprinted()
            elif isinstance(value, tuple):
                dumped[name] = [
                    part.fingerprinted() if isinstance(part, Section) else plain
                    for part, plain in zip(value, dumped[name], strict=True)
                ]
        return dumped


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mappings key by key."""
    merged = {**below, **above}
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping):
            merged[name] = _merged(below[name], value)
    return merged
