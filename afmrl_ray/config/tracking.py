"""Where numbers go beside TensorBoard and `metrics.jsonl`."""

from __future__ import annotations

from pydantic import Field

from afmrl_ray.config.base import Section


class TrackingConfig(Section):
    """Experiment tracking."""

    mlflow_uri: str | None = None
    """MLflow tracking server (http://, https://) or store; none = no MLflow. Needs `pip install .[mlflow]`."""
    mlflow_experiment: str = Field("afmrl_ray", min_length=1)
    """Experiment that the run is filed under."""
