"""What a stage declares about itself, and what its function receives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from afmrl_ray import storage
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import CatalogueConfig
from afmrl_ray.runs import Stage, StageName, StageOutcome
from afmrl_ray.training.cluster import Demand

CATALOGUE = StageName("catalogue")
MODELS = StageName("models")


@dataclass(frozen=True)
class StageContext:
    """What a stage function receives.

    Attributes:
        name: of the stage.
        config: the declared part of the config; reading anything else raises `UndeclaredReadError`.
        directory: the attempt's directory, where outputs are written.
        upstream: committed stages by the roles of the declaration.
        parameters: of the declaration.
        catalogue_config: how the catalogue is opened.
    """

    name: str
    config: Config
    directory: str
    upstream: Mapping[str, Stage]
    parameters: Mapping[str, Any]
    catalogue_config: CatalogueConfig

    @property
    def catalogue(self) -> CatalogueRef:
        """The catalogue, as workers open it; the stage has the upstream role `catalogue`."""
        return catalogue_ref(self.catalogue_config, self.upstream["catalogue"])

    def output(self, role: str, name: str) -> str:
        """Path of an output of an upstream stage."""
        return self.upstream[role].output(name)

    @property
    def upstream_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the upstream stages by name."""
        return {stage.name: stage.fingerprint for stage in self.upstream.values()}

    def path(self, name: str) -> str:
        """Path below the attempt's directory."""
        return storage.join(self.directory, name)


StageFunction = Callable[[StageContext], StageOutcome]


@dataclass(frozen=True)
class StageSpec:
    """The declaration of a stage. Fingerprint, skipping, schedule, resources and documentation derive from it.

    Attributes:
        name: kind and round.
        function: does the work; the first line of its docstring describes the stage.
        reads: dotted names of the config fields that the function reads; see `ConfigProjection`.
        upstream: role to the name of a stage whose outputs the function uses.
        resources: what the stage holds at once.
        parameters: further JSON values that the function uses and that determine its outputs.
        changes: dotted config fields whose values the stage replaces, for variants of a stage.
        resumable: whether the function continues an interrupted attempt instead of starting from an empty directory.
    """

    name: StageName
    function: StageFunction
    reads: tuple[str, ...] = ()
    upstream: Mapping[str, StageName] = field(default_factory=dict)
    resources: tuple[Demand, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    resumable: bool = False

    @property
    def summary(self) -> str:
        """One sentence on what the stage does."""
        function = getattr(self.function, "func", self.function)
        return (function.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")


def upstream_first(names: Iterable[StageName], spec_of: Callable[[StageName], StageSpec]) -> list[StageName]:
    """The named stages and all their upstream stages, each once, upstream first; without recursion.

    Args:
        spec_of: gives the declaration of a stage.
    """
    found: dict[StageName, None] = {}
    waiting = [(name, False) for name in reversed(list(names))]
    while waiting:
        name, upstream_done = waiting.pop()
        if name in found:
            continue
        if upstream_done:
            found[name] = None
        else:
            waiting.append((name, True))
            waiting += [(upstream, False) for upstream in spec_of(name).upstream.values()]
    return list(found)


def catalogue_ref(config: CatalogueConfig, stage: Stage) -> CatalogueRef:
    """The catalogue of a committed catalogue stage: the given one, or the synthetic one that it made."""
    path = storage.absolute(config.path or stage.output("catalogue"))
    return CatalogueRef(path, config, stage.metrics["fingerprint"])
