"""Runs stages: asking for one runs whatever it needs first, and skips what is committed already."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

from afmrl_ray.catalogue import Catalogue, CatalogueRef, StagedCatalogue
from afmrl_ray.cit.mlflow_tracker import MLflowTracker
from afmrl_ray.cit.projection import ConfigProjection, fingerprinted_values
from afmrl_ray.cit.spec import CATALOGUE, MODELS, StageContext, StageSpec, catalogue_ref, upstream_first
from afmrl_ray.cit.stages import declare
from afmrl_ray.cit.stages.training import base_checkpoint
from afmrl_ray.config import Config, with_values
from afmrl_ray.runs import RunDirectory, Stage, StageName
from afmrl_ray.runs.directory import stage_fingerprint
from afmrl_ray.training.cluster import require_resources


class Pipeline:
    """The stages of one run. Every declaration, fingerprint and committed stage is looked up once.

    Args:
        config: the whole config.
        run: the run's directory, which must exist.
        given: the catalogue of `catalogue.path`, opened; none = the run makes the synthetic one.
        tracker: notified of every stage.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        given: Catalogue | None = None,
        tracker: MLflowTracker | None = None,
    ) -> None:
        self.config, self.run, self.given, self.tracker = config, run, given, tracker
        self._specs: dict[StageName, StageSpec] = {}
        self._inputs: dict[StageName, dict[str, Any]] = {}
        self._fingerprints: dict[StageName, str] = {}
        self._stages: dict[StageName, Stage] = {}

    def add(self, spec: StageSpec) -> StageName:
        """Add a stage beside those of `cit.stages`, such as a variant in an experiment; returns its name.

        Raises:
            ValueError: another declaration has that name already.
        """
        if self._specs.setdefault(spec.name, spec) != spec:
            raise ValueError(f"stage {spec.name} is declared twice, in two ways")
        return spec.name

    def spec(self, name: StageName) -> StageSpec:
        """The declaration of a stage."""
        if name not in self._specs:
            self._specs[name] = declare(name, self.config, self.given)
        return self._specs[name]

    def fingerprint(self, name: StageName) -> str:
        """Digest of everything that determines a stage's outputs; nothing is run for it."""
        if name not in self._fingerprints:
            for each in upstream_first([name], self.spec):
                if each not in self._fingerprints:
                    self._inputs[each] = self._inputs_of(self.spec(each))
                    self._fingerprints[each] = stage_fingerprint(str(each), self._inputs[each])
        return self._fingerprints[name]

    def _inputs_of(self, spec: StageSpec) -> dict[str, Any]:
        """What determines the outputs of a stage, as JSON values; fingerprints of its upstream stages are known."""
        inputs: dict[str, Any] = {
            "config": fingerprinted_values(self._config_of(spec), spec.reads),
            "upstream": {str(name): self._fingerprints[name] for name in spec.upstream.values()},
        }
        if spec.parameters:
            inputs["parameters"] = dict(spec.parameters)
        if spec.changes:
            inputs["changes"] = dict(spec.changes)
        return inputs

    def _config_of(self, spec: StageSpec) -> Config:
        return with_values(self.config, spec.changes) if spec.changes else self.config

    def stage(self, name: StageName) -> Stage:
        """The committed stage; it and its upstream stages are run unless they are committed with the same inputs."""
        if name not in self._stages:
            for each in upstream_first([name], self.spec):
                if each not in self._stages:
                    self._stages[each] = self._run(self.spec(each))
        return self._stages[name]

    def _run(self, spec: StageSpec) -> Stage:
        self.fingerprint(spec.name)

        def function(directory: str) -> Any:
            if spec.resources:
                require_resources(str(spec.name), list(spec.resources), wait_s=self.config.ray.wait_for_resources_s)
            return spec.function(self.context(spec.name, directory))

        stage = self.run.run_stage(str(spec.name), self._inputs[spec.name], function, resumable=spec.resumable)
        if self.tracker is not None:
            self.tracker.stage(stage)
        return stage

    def context(self, name: StageName, directory: str) -> StageContext:
        """What a stage's function receives; its upstream stages are run first."""
        spec = self.spec(name)
        return StageContext(
            name=str(name),
            config=cast(Config, ConfigProjection(self._config_of(spec), spec.reads, str(name))),
            directory=directory,
            upstream={role: self.stage(upstream) for role, upstream in spec.upstream.items()},
            parameters=spec.parameters,
            catalogue_config=self.config.catalogue,
        )

    def base_checkpoint(self, role: str) -> str:
        """Checkpoint that the encoder or the generator begins with; a tiny one is made if the config names none."""
        path = getattr(self.config, role).path
        return base_checkpoint(path, None if path is not None else self.stage(MODELS), role)

    @property
    def catalogue_ref(self) -> CatalogueRef:
        """The catalogue, as workers open it."""
        return catalogue_ref(self.config.catalogue, self.stage(CATALOGUE))

    @cached_property
    def catalogue(self) -> StagedCatalogue:
        """The catalogue, memory-mapped."""
        return self.catalogue_ref.open()
