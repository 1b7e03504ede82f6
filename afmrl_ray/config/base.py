"""Base class of the sections of the config tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A frozen group of settings. An unknown key is an error; the string below a field is its description."""

    runtime_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that affect speed, memory or fault tolerance but no result; they are not part of fingerprints."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_field_default(cls, values: Any) -> Any:
        """Complete a partly given subsection from its field's default, which can differ from its class's defaults."""
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        for name, field in cls.model_fields.items():
            given, default = filled.get(name), field.default
            if not (isinstance(given, Mapping) and isinstance(default, Section)):
                continue
            if field.discriminator is None:
                filled[name] = merged(default.model_dump(exclude_unset=True), given)
            elif field.discriminator not in given:
                # Without a kind, the default kind applies.
                filled[name] = {field.discriminator: getattr(default, str(field.discriminator)), **given}
        return filled

    def fingerprinted(self) -> dict[str, Any]:
        """JSON values of all fields that can change a result; the input of fingerprints."""
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


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` merged over `below`, recursively for mappings."""
    together = {**below, **above}
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), Mapping):
            together[name] = merged(below[name], value)
    return together
