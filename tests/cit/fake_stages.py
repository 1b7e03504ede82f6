"""Pipelines whose stages are the real declarations with functions that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from afmrl_ray.cit.pipeline import Pipeline
from afmrl_ray.cit.spec import StageContext, StageSpec
from afmrl_ray.config import Config
from afmrl_ray.retrieval.evaluate import ProtocolResult
from afmrl_ray.retrieval.per_query import FILE, write_per_query
from afmrl_ray.runs import RunDirectory, StageName, StageOutcome

Function = Callable[[StageContext], StageOutcome]
CATALOGUE_METRICS: dict[str, Any] = {"fingerprint": "f" * 64, "counts": {"rows": 12, "kept": 10}}


def evaluation_of(values: Mapping[str, tuple[str, np.ndarray]]) -> Function:
    """An evaluation with given values of queries: protocol to metric and values [Q]."""

    def function(context: StageContext) -> StageOutcome:
        measured = {name: ProtocolResult({}, np.arange(len(v)), {metric: v}) for name, (metric, v) in values.items()}
        write_per_query(context.path(FILE), measured)
        return StageOutcome({"per_query": FILE}, {"queries": len(next(iter(values.values()))[1])})

    return function


class FakePipeline(Pipeline):
    """Stages whose functions are replaced; those of some kinds are kept.

    Args:
        kept: kinds whose function is the real one.
        functions: functions by kind.

    Attributes:
        ran: names of the stages whose functions were called, in order.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        *args: Any,
        kept: tuple[str, ...] = ("promotion",),
        functions: Mapping[str, Function] | None = None,
    ) -> None:
        super().__init__(config, run, *args)
        self._kept, self._functions = kept, dict(functions or {})
        self.ran: list[str] = []

    def spec(self, name: StageName) -> StageSpec:
        spec = super().spec(name)
        if spec.name.kind in self._kept and spec.name.kind not in self._functions:
            function = spec.function
        else:
            function = self._functions.get(spec.name.kind, self._nothing)

        def noted(context: StageContext) -> StageOutcome:
            self.ran.append(context.name)
            return function(context)

        return replace(spec, function=noted, resources=())

    @staticmethod
    def _nothing(context: StageContext) -> StageOutcome:
        if context.name == "catalogue":
            return StageOutcome({}, CATALOGUE_METRICS)
        if context.name.startswith("evaluate"):
            return evaluation_of({"fine": ("hit@1", np.ones(10))})(context)
        return StageOutcome({}, {})


def fake_run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(str(tmp_path), "t")
    run.create()
    return run
