"""Settings of the run and of Ray: cluster, worker groups, actor pools and their placement."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from afmrl_ray.config.base import Section


class RunConfig(Section):
    """Name, location and seed of a run."""

    runtime_only = frozenset({"name", "storage_path"})

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its directory is `<storage_path>/<name>`."""
    storage_path: str = "runs"
    """Folder or URI (s3://, gs://) of all runs; every node must have access to it."""
    seed: int = Field(0, ge=0)
    """Seed of weight initialisation, batches, prompts and sampling."""


class RayConfig(Section):
    """Connection to Ray."""

    runtime_only = frozenset({"address", "num_cpus", "object_store_mb", "namespace", "wait_for_resources_s"})

    address: str | None = None
    """Address of the cluster; none = that of RAY_ADDRESS, or else a local Ray that the job starts."""
    num_cpus: int | None = Field(None, gt=0)
    """CPUs of the local Ray; none = all of the machine. Has no effect on a cluster."""
    object_store_mb: int = Field(512, ge=80)
    """Object store memory of the local Ray, MiB. Has no effect on a cluster."""
    namespace: str = "afmrl"
    """Ray namespace of the named reward actors."""
    wait_for_resources_s: float = Field(60, gt=0)
    """Seconds to wait until the cluster has a stage's resources; then the job ends and reports what is available."""


class PlacementConfig(Section):
    """Placement of the actors of a pool, or of the workers of a group, on nodes."""

    runtime_only = frozenset({"strategy", "labels", "resources", "timeout_s"})

    strategy: Literal["default", "pack", "spread", "strict_spread"] = "default"
    """`default`: Ray decides. `pack`: on as few nodes as possible. `spread`: on as many nodes as possible.
    `strict_spread`: each on a separate node. All but `default` reserve the resources of all of them at once."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Required node labels (`ray start --labels`, `labels` of a KubeRay group), such as afmrl/role: reward."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources that each of them needs, by the names given with `ray start --resources`."""
    timeout_s: float = Field(120, gt=0)
    """Seconds to wait for the placement; then the job ends and reports what is available."""


class WorkersConfig(Section):
    """A Ray Train worker group with DeepSpeed inside.

    The number of workers may change between restarts and within a run. Batches and their order stay the same; results
    differ by the order of floating-point sums and, if the adapter has dropout, by its random masks, which each worker
    draws for its own part of the batch.
    """

    runtime_only = frozenset(
        {
            "num_workers", "min_workers", "cpus_per_worker", "use_gpu",
            "checkpoint_every", "checkpoints_kept", "max_failures", "collective_timeout_s", "peak_tflops", "placement",
        }
    )  # fmt: skip

    num_workers: int = Field(1, ge=1)
    """Number of data-parallel workers, which share each batch evenly. May be changed before a training is resumed."""
    min_workers: int | None = Field(None, ge=1)
    """Smallest number of workers with which training starts, or continues after nodes are lost; the group grows again
    when nodes return. None = the number is fixed."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs of a worker; also its number of torch threads (rounded down, at least 1)."""
    use_gpu: bool = False
    """Whether each worker uses one GPU."""
    placement: PlacementConfig = PlacementConfig()
    """Placement on nodes; `default` packs."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage, 0 to 3."""
    checkpoint_every: int = Field(100, gt=0)
    """Steps between checkpoints. A crash loses at most these, and the steps made while a checkpoint was written."""
    checkpoints_kept: int = Field(2, ge=1)
    """Number of latest checkpoints that are kept."""
    max_failures: int = Field(3, ge=0)
    """Number of worker failures that are tolerated, each by a restart from the last checkpoint."""
    collective_timeout_s: float = Field(600, gt=0)
    """Timeout of a collective operation, seconds; then the worker fails."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of a worker's device, TFLOP/s, for the metric time/mfu; none = the bfloat16 peak of known GPUs."""

    @model_validator(mode="after")
    def _elastic_within_bounds(self) -> WorkersConfig:
        if self.min_workers is None:
            return self
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers {self.num_workers}; lower it")
        if self.zero_stage:
            raise ValueError(
                f"min_workers needs a whole optimizer on every worker, but zero_stage {self.zero_stage} shards it; "
                "set zero_stage=0 or leave min_workers out"
            )
        return self

    @property
    def least(self) -> int:
        """Smallest number of workers with which training starts."""
        return self.min_workers or self.num_workers


class PoolConfig(Section):
    """A pool of Ray actors (or Ray Data actors) for inference."""

    runtime_only = frozenset({"num_workers", "cpus_per_worker", "gpus_per_worker", "placement"})

    num_workers: int = Field(1, ge=1)
    """Number of actors."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs of an actor; also its number of torch threads (rounded down, at least 1)."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of an actor; with a fraction several actors share one."""
    placement: PlacementConfig = PlacementConfig()
    """Placement on nodes."""
    batch_size: int = Field(64, gt=0)
    """Number of rows that an actor processes at once."""
