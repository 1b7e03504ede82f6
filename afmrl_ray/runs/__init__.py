"""A run on disk: its directory, the names of its stages, and the records of committed ones."""

from __future__ import annotations

from afmrl_ray.runs.directory import RunDirectory, StageOutcome
from afmrl_ray.runs.names import StageName
from afmrl_ray.runs.records import STAGE_RECORD, RunReader, Stage

__all__ = ["STAGE_RECORD", "RunDirectory", "RunReader", "Stage", "StageName", "StageOutcome"]
