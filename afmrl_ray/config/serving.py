"""Arguments of the serving application (`serve run afmrl_ray.serving:app_builder run=runs/demo`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from afmrl_ray.config.base import Section


class ReplicasConfig(Section):
    """Replicas of one deployment."""

    min_replicas: int = Field(1, ge=1)
    """Least number of replicas."""
    max_replicas: int = Field(1, ge=1)
    """Most replicas under load."""
    target_ongoing_requests: float = Field(8, gt=0)
    """Requests under way per replica, above which a replica is added."""
    max_ongoing_requests: int = Field(64, gt=0)
    """Requests that a replica accepts at once; more wait in the caller's queue."""
    max_queued_requests: int = Field(32, ge=0)
    """Length of a caller's queue; more requests are answered 503 with Retry-After."""
    cpus: float = Field(0.75, gt=0)
    """CPUs of a replica; also its torch threads, rounded down to at least 1. One of each deployment fits on 2 CPUs."""
    gpus: float = Field(0, ge=0)
    """GPUs of a replica; with a fraction several replicas share one."""
    drain_s: float = Field(20, ge=0)
    """Seconds in which a replica that is removed may finish its requests."""

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class BatchConfig(Section):
    """How requests to a model are batched."""

    tokens: int = Field(8192, gt=0)
    """Most tokens of a batch, visual ones counted; a longer request is a batch of its own. 1 = no batching."""
    wait_ms: float = Field(10, ge=0)
    """Longest wait of a batch that is not full, milliseconds."""


class LimitsConfig(Section):
    """Limits of a request; one that exceeds them is answered with a 4xx status."""

    body_mb: float = Field(16, gt=0)
    """Most size of a request's body, MB."""
    image_pixels: int = Field(16_000_000, gt=0)
    """Most pixels of an image, read from its header."""
    title_characters: int = Field(2000, gt=0)
    """Most characters of a title."""
    attributes: int = Field(32, gt=0)
    """Most given attributes, and most attributes of a filter."""
    k: int = Field(100, gt=0)
    """Most hits of a search."""
    batch: int = Field(32, gt=0)
    """Most inputs of a request for embeddings."""
    request_s: float = Field(30, gt=0)
    """Deadline of a request, seconds; one that takes longer is answered 503."""


class AuthConfig(Section):
    """Authentication."""

    keys_file: str | None = None
    """File with a line `name:role:sha256` for each API key, role `user` or `admin`; made by `jobs/api_key.py`. None =
    the file that the environment variable AFMRL_API_KEYS_FILE names."""
    anonymous_on_loopback: bool = False
    """Whether requests from this machine need no key. Never set it behind a proxy on the same machine."""


class ServingConfig(Section):
    """All settings of the application."""

    run: str
    """Folder or URI of the run that is served."""
    round: int | None = Field(None, ge=0)
    """Round to start with; none = the one that was served last, else the last promoted one."""
    state_dir: str | None = None
    """Local folder of the upserted items and the served round, shared by all replicas of the index; none = `serving` in
    the run's folder."""
    attributes_source: Literal["generated", "none"] = "generated"
    """Attributes of a search that does not name their source."""
    max_pairs: int | None = Field(None, gt=0)
    """Attributes after which the generator is stopped, for speed; none = it ends by itself."""
    cached_attributes: int = Field(100_000, ge=0)
    """Generated attribute texts that each ingress replica caches."""
    max_delta_items: int = Field(10_000, gt=0)
    """Upserted items above which they are merged into a new copy of the index; until then they are searched
    exhaustively."""
    rounds_kept: int = Field(2, ge=2)
    """Rounds that a replica keeps loaded: the served one, and others to switch to or back to."""
    cors_origins: tuple[str, ...] = ()
    """Origins that browsers may call from; none = only the page itself."""
    auth: AuthConfig = AuthConfig()
    """Authentication."""
    limits: LimitsConfig = LimitsConfig()
    """Limits of a request."""
    batching: BatchConfig = BatchConfig()
    """Batching of both models."""
    ingress: ReplicasConfig = ReplicasConfig(cpus=0.25, max_ongoing_requests=64, max_queued_requests=64)
    """The HTTP deployment."""
    encoder: ReplicasConfig = ReplicasConfig()
    """The embedding encoder."""
    generator: ReplicasConfig = ReplicasConfig()
    """The attribute generator."""
    index: ReplicasConfig = ReplicasConfig(cpus=0.25, max_ongoing_requests=64)
    """Search. Its replicas share `state_dir`, which needs a file system with locks that all of them see."""

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, values: Any) -> Any:
        """Nest dotted keys, as `serve run ... auth.keys_file=...` passes them."""
        if not isinstance(values, dict):
            return values
        found: dict[str, Any] = {}
        for key, value in values.items():
            *sections, field = str(key).split(".")
            inner = found
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[field] = value
        return found
