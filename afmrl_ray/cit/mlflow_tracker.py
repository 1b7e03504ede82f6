"""A run's committed stages in MLflow: one MLflow run for each run, found again when the job is resumed."""

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
from afmrl_ray.runs.directory import RunDirectory, Stage
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

    A stage is logged once. What cannot be logged because the server is away is logged by the next job of the run.

    Settings are parameters of the MLflow run. MLflow lets nobody change a parameter, so one keeps the value that it was
    first logged with; what a later job has changed stands in the tag `changed/<setting>`.

    Args:
        config: `tracking` of it names the server.
        run: in whose directory the id of the MLflow run is kept.

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
            told = self._client.get_run(self._run_id).data
            self._log_settings(settings_of(config), told.params, told.tags)
            self._logged = {
                name.removeprefix("stage."): value for name, value in told.tags.items() if name.startswith("stage.")
            }
        except MlflowException as error:
            raise ConfigError(f"tracking.mlflow_uri {self._place}: {_told(error)}") from error

    def _run_of(self, config: Config, record: str) -> str:
        """The id of the run's MLflow run, made at the first time and for every other server or experiment."""
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
        """Log what is not a parameter yet as one, and what has another value than its parameter as a tag."""
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
        """Log a committed stage, unless that was done; a server that is away is warned of."""
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
                _told(error),
            )

    def report(self, index: str) -> None:
        """Add the report's page, which needs nothing else, as an artifact."""
        try:
            self._client.log_text(self._run_id, storage.read_bytes(index).decode(), "report/index.html")
        except self._failure as error:
            log.warning("MLflow at %s did not take the report: %s", self._place, _told(error))

    def close(self, *, finished: bool) -> None:
        """Say that the job has ended; the MLflow run is gone on with when the job is resumed."""
        try:
            self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")
        except self._failure as error:
            log.warning("MLflow at %s was not told that the run has ended: %s", self._place, _told(error))

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
    """The settings as MLflow takes them, by name with slashes, without credentials."""
    dumped = without_credentials(config.model_dump(mode="json"))
    return {key_of(key): str(value)[:_LONGEST_SETTING] for key, value in _flat(dumped)}


def _told(error: Exception) -> str:
    """A failure in one line, without credentials of the server's address."""
    return str(without_credentials(" ".join(str(error).split())))[:_LONGEST_MESSAGE]


def key_of(name: str) -> str:
    """A name as MLflow takes it: `hit@1` becomes `hit_at_1`, what else it does not know an underscore."""
    return _FORBIDDEN.sub("_", name.replace("@", "_at_"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
