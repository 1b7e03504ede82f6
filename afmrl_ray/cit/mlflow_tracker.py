"""Logs a run's committed stages to MLflow: one MLflow run for each run, continued by resumed jobs."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from afmrl_ray import storage
from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError
from afmrl_ray.redact import without_credentials
from afmrl_ray.runs import RunDirectory, Stage
from afmrl_ray.training.metrics_log import read_metrics

if TYPE_CHECKING:
    from mlflow.entities import Metric

log = logging.getLogger(__name__)

_RECORD = "mlflow.json"
_FORBIDDEN = re.compile(r"[^\w\-./ ]")
_MOST_METRICS, _MOST_SETTINGS, _LONGEST_SETTING = 1000, 100, 6000
_LONGEST_MESSAGE = 1000
_CHANGED = "changed/"


class MLflowTracker:
    """Logs a stage when it is committed: its metrics, and those of its steps.

    A stage is logged once. If the server cannot be reached, the next job of the run logs what is missing.

    Settings are parameters of the MLflow run. MLflow does not allow a parameter to change, so each keeps its first
    value; values that a later job changes are in the tag `changed/<setting>`.

    Args:
        config: its section `tracking` names the server.
        run: its directory keeps the id of the MLflow run.

    Raises:
        ConfigError: MLflow is not installed, or the server cannot be reached.
    """

    def __init__(self, config: Config, run: RunDirectory) -> None:
        uri = config.tracking.mlflow_uri
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError("tracking.mlflow_uri is set, but MLflow is not installed; pip install .[mlflow]")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._place, self._failure = without_credentials(uri), MlflowException
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = self._run_of(config, storage.join(run.path, _RECORD))
            logged = self._client.get_run(self._run_id).data
            self._log_settings(settings_of(config), logged.params, logged.tags)
            self._logged = {
                name.removeprefix("stage."): value for name, value in logged.tags.items() if name.startswith("stage.")
            }
        except MlflowException as error:
            raise ConfigError(f"tracking.mlflow_uri {self._place}: {_one_line(error)}") from error

    def _run_of(self, config: Config, record: str) -> str:
        """The id of the run's MLflow run; created the first time, and once for every server and experiment."""
        name = config.tracking.mlflow_experiment
        if storage.exists(record):
            found = storage.read_json(record)
            if (without_credentials(found["uri"]), found.get("experiment", name)) == (self._place, name):
                return str(found["run_id"])
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        made = self._client.create_run(number, run_name=config.run.name)
        storage.write_json(record, {"run_id": made.info.run_id, "uri": self._place, "experiment": name})
        return str(made.info.run_id)

    def _log_settings(self, settings: Mapping[str, str], params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log new settings as parameters, and settings that differ from their parameter as tags."""
        from mlflow.entities import Param, RunTag

        new = [Param(key, value) for key, value in settings.items() if key not in params]
        changed = [
            RunTag(_CHANGED + key, value)
            for key, value in settings.items()
            if params.get(key, value) != value or tags.get(_CHANGED + key, value) != value
        ]
        for start in range(0, max(len(new), len(changed)), _MOST_SETTINGS):
            here = slice(start, start + _MOST_SETTINGS)
            self._client.log_batch(self._run_id, params=new[here], tags=changed[here])

    def stage(self, stage: Stage) -> None:
        """Log a committed stage once; a server that cannot be reached causes a warning."""
        if self._logged.get(stage.name) == stage.fingerprint:
            return
        try:
            metrics = list(self._metrics(stage))
            for start in range(0, len(metrics), _MOST_METRICS):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + _MOST_METRICS])
            self._client.set_tag(self._run_id, f"stage.{stage.name}", stage.fingerprint)
            self._logged[stage.name] = stage.fingerprint
        except self._failure as error:
            log.warning(
                "MLflow at %s did not take stage %s, the next job tries again: %s",
                self._place,
                stage.name,
                _one_line(error),
            )

    def report(self, index: str) -> None:
        """Log the report's page, a self-contained file, as an artifact."""
        try:
            self._client.log_text(self._run_id, storage.read_bytes(index).decode(), "report/index.html")
        except self._failure as error:
            log.warning("MLflow at %s did not take the report: %s", self._place, _one_line(error))

    def close(self, *, finished: bool) -> None:
        """Mark the MLflow run as ended; a resumed job continues it."""
        try:
            self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")
        except self._failure as error:
            log.warning("MLflow at %s could not be notified of the end of the run: %s", self._place, _one_line(error))

    def _metrics(self, stage: Stage) -> Iterator[Metric]:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        for key, value in _flat({**stage.metrics, "seconds": stage.seconds}):
            if _is_number(value):
                yield Metric(key_of(f"{stage.name}/{key}"), float(value), now, 0)
        for record in read_metrics(storage.join(stage.directory, "log")):
            when, step = int(1000 * record.get("time", 0)), int(record["step"])
            for key, value in record.items():
                if key not in ("step", "time") and _is_number(value):
                    yield Metric(key_of(f"{stage.name}/step/{key}"), float(value), when, step)


def settings_of(config: Config) -> dict[str, str]:
    """All settings as MLflow parameters: names with slashes, values as text, without credentials."""
    dumped = without_credentials(config.model_dump(mode="json"))
    return {key_of(key): str(value)[:_LONGEST_SETTING] for key, value in _flat(dumped)}


def _one_line(error: Exception) -> str:
    """An error message in one line, without credentials."""
    return str(without_credentials(" ".join(str(error).split())))[:_LONGEST_MESSAGE]


def key_of(name: str) -> str:
    """A valid MLflow name: `hit@1` becomes `hit_at_1`, and other characters that MLflow refuses an underscore."""
    return _FORBIDDEN.sub("_", name.replace("@", "_at_"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
