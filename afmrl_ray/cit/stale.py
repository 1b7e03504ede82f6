"""Stages whose results the run's config would not give: the same command runs them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from afmrl_ray.runs import Stage


def stale_stages(stages: Sequence[Stage], config: Mapping[str, Any]) -> set[str]:
    """Names of stages made with other settings than the run's, or downstream of one that has since changed.

    Args:
        stages: all that are committed.
        config: the run's config as JSON values.
    """
    found = {stage.name: stage for stage in stages}
    dependants: dict[str, list[str]] = {name: [] for name in found}
    stale = {stage.name for stage in stages if not made_with(stage, config)}
    for stage in stages:
        for name, fingerprint in upstream_fingerprints(stage).items():
            if name in found:
                dependants[name].append(stage.name)
                if found[name].fingerprint != fingerprint:
                    stale.add(stage.name)
    waiting = list(stale)
    while waiting:
        reached = set(dependants[waiting.pop()]) - stale
        stale |= reached
        waiting += reached
    return stale


def upstream_fingerprints(stage: Stage) -> dict[str, str]:
    """Fingerprints of a stage's upstream stages by name; empty where its record does not name them."""
    upstream = stage.inputs.get("upstream")
    return dict(upstream) if isinstance(upstream, Mapping) else {}


def made_with(stage: Stage, config: Mapping[str, Any]) -> bool:
    """Whether the settings that a stage read are those of a config, except for those that its variant changes."""
    settings: dict[str, Any] = dict(stage.inputs.get("config", {}))
    for key in stage.inputs.get("changes", {}):
        settings = _without(settings, key)
    return _agree(settings, config)


def _without(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The settings but for the value at a dotted key."""
    section, _, rest = key.partition(".")
    left = {name: value for name, value in settings.items() if name != section}
    inner = settings.get(section)
    if rest and isinstance(inner, Mapping):
        left[section] = _without(inner, rest)
    return left


def _agree(part: Any, whole: Any) -> bool:
    if isinstance(part, Mapping) and isinstance(whole, Mapping):
        return all(key in whole and _agree(value, whole[key]) for key, value in part.items())
    return bool(part == whole)
