"""Settings of the run itself and of the Ray it runs on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from afmrl_ray.config.base import Section


class RunConfig(Section):
    """Where a run is stored, and its seed."""

    runtime_only = frozenset({"name", "storage_path"})

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its directory is `<storage_path>/<name>`."""
    storage_path: str = "runs"
    """Folder or URI (s3://, gs://) of all runs; every node must see it."""
    seed: int = Field(0, ge=0)
    """Seed of weights, batches, prompts and sampling."""


class RayConfig(Section):
    """How a job reaches Ray."""

    runtime_only = frozenset({"address", "num_cpus", "object_store_mb", "namespace", "wait_for_resources_s"})

    address: str | None = None
    """Cluster to join; none = the one that RAY_ADDRESS names, else a local Ray started by the job."""
    num_cpus: int | None = Field(None, gt=0)
    """CPUs of the local Ray; none = all of the machine. Not used when a cluster is joined."""
    object_store_mb: int = Field(512, ge=80)
    """Object store of the local Ray, MiB. Not used when a cluster is joined."""
    namespace: str = "afmrl"
    """Ray namespace in which reward actors are named."""
    wait_for_resources_s: float = Field(60, gt=0)
    """Seconds to wait for a cluster to have what a stage asks for; then the job ends and says what is there."""


class PlacementConfig(Section):
    """On which nodes the actors of a pool, or the workers of a group, run."""

    runtime_only = frozenset({"strategy", "labels", "resources", "timeout_s"})

    strategy: Literal["default", "pack", "spread", "strict_spread"] = "default"
    """`default`: as Ray sees fit. `pack`: on as few nodes as there is room on. `spread`: over as many as there are;
    `strict_spread`: each on a node of its own. All but the default take room for all of them at once."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes have (`ray start --labels`, `labels` of a KubeRay group), such as afmrl/role: reward."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources that each of them takes, by the names given with `ray start --resources`."""
    timeout_s: float = Field(120, gt=0)
    """Seconds to wait for the room; then the job ends and says what is there."""


class WorkersConfig(Section):
    """A Ray Train worker group with DeepSpeed inside.

    The number of workers may change between restarts and within a run. Batches and their order stay the same; results
    differ by the order in which floats are summed and, where the adapter has dropout, by its draws, which each worker
    makes for its own share.
    """

    runtime_only = frozenset(
        {
            "num_workers", "min_workers", "cpus_per_worker", "use_gpu",
            "checkpoint_every", "checkpoints_kept", "max_failures", "collective_timeout_s", "peak_tflops", "placement",
        }
    )  # fmt: skip

    num_workers: int = Field(1, ge=1)
    """Data-parallel workers; a step's batch is cut evenly among them. May be changed before a training is resumed."""
    min_workers: int | None = Field(None, ge=1)
    """Smallest group that begins, or goes on when nodes are lost; it grows again when they come back. None = fixed."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs of a worker; also its torch threads, rounded down to at least 1."""
    use_gpu: bool = False
    """Whether each worker takes one GPU."""
    placement: PlacementConfig = PlacementConfig()
    """On which nodes; `default` packs."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    checkpoint_every: int = Field(100, gt=0)
    """Steps between checkpoints; what a crash may cost is this many steps, and those of the seconds of a commit."""
    checkpoints_kept: int = Field(2, ge=1)
    """Latest checkpoints kept while training."""
    max_failures: int = Field(3, ge=0)
    """Worker failures survived by a restart from the last checkpoint."""
    collective_timeout_s: float = Field(600, gt=0)
    """Seconds after which a hung collective call ends the worker."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of a worker's device, TFLOP/s, for the utilisation in the metrics; none = that of known GPUs in bfloat16."""

    @model_validator(mode="after")
    def _elastic_within_bounds(self) -> WorkersConfig:
        if self.min_workers is None:
            return self
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers {self.num_workers}; lower it")
        if self.zero_stage:
            raise ValueError(
                f"min_workers needs whole optimizers on every worker, zero_stage {self.zero_stage} cuts them; "
                "set zero_stage=0 or leave min_workers out"
            )
        return self

    @property
    def least(self) -> int:
        """Workers without which nothing begins."""
        return self.min_workers or self.num_workers


class PoolConfig(Section):
    """A pool of Ray actors (or Ray Data actors) that run a model without training it."""

    runtime_only = frozenset({"num_workers", "cpus_per_worker", "gpus_per_worker", "placement"})

    num_workers: int = Field(1, ge=1)
    """Actors in the pool."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs of an actor; also its torch threads, rounded down to at least 1."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of an actor; a fraction lets several share one."""
    placement: PlacementConfig = PlacementConfig()
    """On which nodes."""
    batch_size: int = Field(64, gt=0)
    """Rows that an actor handles at once."""
