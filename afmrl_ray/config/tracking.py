"""Settings of experiment tracking, besides TensorBoard and `metrics.jsonl`."""

from __future__ import annotations

from pydantic import Field

from afmrl_ray.config.base import Section


class TrackingConfig(Section):
    """Experiment tracking."""

    mlflow_uri: str | None = None
    """URI of an MLflow tracking server (http://, https://) or store; none = no MLflow. A server needs `pip install
    .[mlflow]`; a `file://` store needs MLFLOW_ALLOW_FILE_STORE=true in the environment, and `sqlite:///` needs `pip
    install mlflow`. Put a server's credentials into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, since MLflow
    prints the URI."""
    mlflow_experiment: str = Field("afmrl_ray", min_length=1)
    """MLflow experiment of the run. With another experiment or `mlflow_uri` the run becomes a new MLflow run."""
