"""The driver: checks what it was given, then alternates the two trainings, stage by committed stage."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from afmrl_ray import storage
from afmrl_ray.agcl.batches import PairSampler
from afmrl_ray.catalogue import check_positives, open_catalogue
from afmrl_ray.cit.mlflow_tracker import MLflowTracker
from afmrl_ray.cit.pipeline import Pipeline
from afmrl_ray.cit.promotion import converged
from afmrl_ray.cit.run_lock import RunLock
from afmrl_ray.cit.schedule import resources
from afmrl_ray.cit.spec import CATALOGUE
from afmrl_ray.config import Config
from afmrl_ray.config.evaluation import RetrievalProtocol
from afmrl_ray.config.train import BatchGroupingConfig
from afmrl_ray.errors import CatalogueError, ConfigError
from afmrl_ray.models.adapters import check_targets
from afmrl_ray.models.backbones import check_checkpoint
from afmrl_ray.retrieval.evaluate import Value
from afmrl_ray.runs import RunDirectory, StageName
from afmrl_ray.training.cluster import ray_session, require_resources

log = logging.getLogger(__name__)

_COMMAND = "afmrl"

_TRAINED_BY = {"encoder": ("agcl",), "generator": ("distill", "rar")}
"""Sections whose adapters a model gets."""
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "rank-bm25", "pyarrow")


@contextmanager
def open_run(config: Config) -> Iterator[Pipeline]:
    """Check what the config names, join or start Ray, and yield the run's pipeline.

    Nothing is written before the models, the resources and, where it exists already, the catalogue are known to fit.

    Raises:
        UserError: something that the config names does not exist or does not fit.
    """
    for setting, role in (("encoder", config.encoder.role), ("generator", "generator"), ("teacher", "generator")):
        path = getattr(getattr(config, setting), "path", None)
        if path is not None:
            check_checkpoint(path, role, setting=f"{setting}.path")
            for section in _TRAINED_BY.get(setting, ()):
                check_targets(path, role, getattr(config, section).adapter, setting=f"{section}.adapter")
    run = RunDirectory(config.run.storage_path, config.run.name)
    with ray_session(config.ray):
        # Nodes may still join a cluster, but never a Ray that the job started itself.
        joined = bool(config.ray.address or os.environ.get("RAY_ADDRESS"))
        for stage, asked in resources(config).items():
            require_resources(stage, asked, wait_s=config.ray.wait_for_resources_s if joined else 0.0)
        given = None
        if config.catalogue.path is not None:
            given = open_catalogue(config.catalogue.path, config=config.catalogue)
            check_selectors(config, given)
        run.create()
        with RunLock(run.path) as run_lock:
            run.guard = run_lock.check
            yield from _opened(config, run, given)


def _opened(config: Config, run: RunDirectory, given: Any) -> Iterator[Pipeline]:
    tracker = MLflowTracker(config, run) if config.tracking.mlflow_uri is not None else None
    finished = False
    try:
        pipeline = Pipeline(config, run, given, tracker)
        if given is None:
            check_selectors(config, pipeline.catalogue)
        run.write_run({**run_record(config, pipeline), **commands(_recorded(run), own_command(), job=_job())})
        yield pipeline
        finished = True
    finally:
        if tracker is not None:
            tracker.close(finished=finished)


def run_cit(pipeline: Pipeline) -> None:
    """Run every stage that is not committed yet, until all rounds are done, one is refused, or rounds stop gaining."""
    record_whole(pipeline.run, own_command())
    config = pipeline.config.cit
    pipeline.stage(StageName("baselines"))
    if config.baseline:
        pipeline.stage(StageName("evaluate-baseline"))
    gains: list[Value] = []
    for number in range(config.rounds):
        found = pipeline.stage(StageName("promotion", number)).metrics
        if not found["promoted"]:
            log.warning("round %d is refused (cit.gate), the run ends: %s", number, "; ".join(found["why"]))
            return
        if "gain" in found:
            gains.append(Value(**found["gain"]))
        if converged(gains, config.patience) and number + 1 < config.rounds:
            log.info(
                "round %d: no significant gain for %d rounds (cit.patience), the run ends", number, config.patience
            )
            return


def check_selectors(config: Config, catalogue: Any) -> None:
    """Check that every item selector and column of the config matches something, and that queries have positives.

    Raises:
        CatalogueError: a selector matches nothing, a column is missing, or a protocol has no positive or no
            common class.
    """
    for column in config.generator.title_columns:
        catalogue.column(column)
    catalogue.rows(config.distill.items)
    catalogue.rows(config.annotate.items)
    task = config.rar.task
    check_positives(catalogue, task.query, task.gallery)
    check_positives(catalogue, task.heldout_query, task.heldout_gallery)
    for pair in config.agcl.pairs:
        check_positives(catalogue, pair.query, pair.positive)
    for protocol in config.evaluation.protocols:
        if isinstance(protocol, RetrievalProtocol):
            check_positives(catalogue, protocol.query, protocol.gallery)
        else:
            labels = catalogue.column(protocol.label)
            fit, test = (
                {labels[row] for row in catalogue.rows(selector).tolist()} for selector in (protocol.fit, protocol.test)
            )
            if not (fit & test) - {None}:
                raise CatalogueError(
                    f"evaluation protocol {protocol.name!r}: fit and test share no class of column {protocol.label!r}"
                )
    # The sampler checks the size of a batch; what groups are made of is known only when attributes are there.
    ungrouped = config.agcl.model_copy(update={"batch_grouping": BatchGroupingConfig()})
    PairSampler(catalogue, ungrouped, seed=config.run.seed)
    if config.distill.batch_size > (rows := len(catalogue.rows(config.distill.items))):
        raise ConfigError(
            f"distill.batch_size {config.distill.batch_size} exceeds the {rows} rows of distill.items; lower it"
        )


def run_record(config: Config, pipeline: Pipeline) -> dict[str, Any]:
    """Contents of `run.json`, without its commands: resolved config, versions, catalogue."""
    metrics = pipeline.stage(CATALOGUE).metrics
    return {
        "name": config.run.name,
        "config": config.model_dump(mode="json"),
        "versions": {
            "afmrl_ray": metadata.version("afmrl_ray"),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "catalogue": {"fingerprint": metrics["fingerprint"], **metrics["counts"]},
    }


def own_command() -> str:
    """This process's command line, to be pasted into a shell at the same working directory."""
    program, arguments = [sys.argv[0]], sys.argv[1:]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:
        # Started with `python -m`: the file alone would not find the package's other modules.
        program = ["-m", spec.name]
    words = [os.path.relpath(part) if os.path.exists(part) else part for part in arguments]
    if os.path.basename(sys.argv[0]) == _COMMAND:
        return shlex.join([_COMMAND, *words])
    program = [os.path.relpath(part) if os.path.exists(part) else part for part in program]
    return shlex.join(["python", *program, *words])


def _job() -> str:
    """The program's name: a file of `jobs/`, or `afmrl` with its subcommand."""
    name = os.path.basename(sys.argv[0])
    if name != _COMMAND:
        return name
    subcommand = itertools.takewhile(lambda word: not word.startswith("-") and "=" not in word, sys.argv[1:])
    return " ".join([name, *subcommand])


def _recorded(run: RunDirectory) -> dict[str, Any]:
    return run.read_run() if storage.exists(storage.join(run.path, "run.json")) else {}


def commands(before: Mapping[str, Any], command: str, *, job: str) -> dict[str, Any]:
    """The `command` that makes the whole run and the last command of each job (`jobs`), for `run.json`.

    Until a job has made the whole run (`record_whole`), the command is that of the last job.

    Args:
        before: `run.json` as it was.
        command: of a job that runs a part of the stages.
        job: its file name.
    """
    parts, made_by = before.get("jobs", {}), before.get("command", command)
    # A command that is also listed for a part was recorded because there was none for the whole run.
    whole = made_by not in parts.values()
    return {"command": made_by if whole else command, "jobs": {**parts, job: command}}


def record_whole(run: RunDirectory, command: str) -> None:
    """Record in `run.json` the command that makes the whole run; jobs that run parts of it do not change that."""
    record = _recorded(run)
    parts = {job: of_part for job, of_part in record.get("jobs", {}).items() if job != _job()}
    run.write_run({**record, "command": command, "jobs": parts})
