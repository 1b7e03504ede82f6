"""Where numbers go beside TensorBoard and `metrics.jsonl`."""

from __future__ import annotations

from pydantic import Field

from afmrl_ray.config.base import Section


class TrackingConfig(Section):
    """Experiment tracking."""

    mlflow_uri: str | None = None
    """MLflow tracking server (http://, https://), or a store without one; none = no MLflow. `pip install .[mlflow]` is
    enough for a server; MLflow opens a `file://` store only with MLFLOW_ALLOW_FILE_STORE=true in the environment, and
    `sqlite:///` only with `pip install mlflow`. User and password of a server belong in MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD: MLflow itself prints the address."""
    mlflow_experiment: str = Field("afmrl_ray", min_length=1)
    """Experiment that the run is filed under; under another one, or at another `mlflow_uri`, it is a new MLflow run."""
