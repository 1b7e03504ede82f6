"""Arguments of the served application (`serve run afmrl_ray.serving:app_builder run=runs/demo`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from afmrl_ray.config.base import Section


class ReplicasConfig(Section):
    """Replicas of one deployment."""

    min_replicas: int = Field(1, ge=1)
    """Replicas that are always there."""
    max_replicas: int = Field(1, ge=1)
    """Replicas under load."""
    target_ongoing_requests: float = Field(8, gt=0)
    """Requests under way on a replica, above which another one is added."""
    max_ongoing_requests: int = Field(64, gt=0)
    """Requests that a replica takes at once; more wait in the queue of the caller."""
    max_queued_requests: int = Field(32, ge=0)
    """Requests that wait in the queue of a caller; more are answered 503 with Retry-After."""
    cpus: float = Field(0.75, gt=0)
    """CPUs of a replica; also its torch threads, rounded down to at least 1. One of each deployment fits on 2."""
    gpus: float = Field(0, ge=0)
    """GPUs of a replica; a fraction lets several share one."""
    drain_s: float = Field(20, ge=0)
    """Seconds that a replica which is taken away may finish its requests in."""

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class BatchConfig(Section):
    """How requests to a model are batched."""

    tokens: int = Field(8192, gt=0)
    """Tokens of a batch, visual ones counted; a longer request is a batch of its own. 1 = no batching."""
    wait_ms: float = Field(10, ge=0)
    """Milliseconds that an unfilled batch waits for company."""


class LimitsConfig(Section):
    """What a request may be at most; anything above is refused with a 4xx."""

    body_mb: float = Field(16, gt=0)
    """Size of a request's body, MB."""
    image_pixels: int = Field(16_000_000, gt=0)
    """Pixels of an image, judged from its header."""
    title_characters: int = Field(2000, gt=0)
    """Length of a title."""
    attributes: int = Field(32, gt=0)
    """Given attributes, or attributes in a filter."""
    k: int = Field(100, gt=0)
    """Hits of a search."""
    batch: int = Field(32, gt=0)
    """Inputs of a request for embeddings."""
    request_s: float = Field(30, gt=0)
    """Seconds after which a request is given up, with 503."""


class AuthConfig(Section):
    """Who may ask."""

    keys_file: str | None = None
    """File with a line `name:role:sha256` for each API key, role `user` or `admin`; made by `jobs/api_key.py`. None =
    the file that the environment variable AFMRL_API_KEYS_FILE names."""
    anonymous_on_loopback: bool = False
    """Whether requests from this machine need no key. Never set it behind a proxy on the same machine."""


class ServingConfig(Section):
    """Everything that the application is told."""

    run: str
    """Folder or URI of the run that is served."""
    round: int | None = Field(None, ge=0)
    """Round to begin with; none = the one that was served last, else the last one that was promoted."""
    state_dir: str | None = None
    """Local folder, the same for all replicas of the index, with what was put in and the round that is served; none =
    `serving` below the run."""
    attributes_source: Literal["generated", "none"] = "generated"
    """Whether a search that does not say is made with generated attributes."""
    max_pairs: int | None = Field(None, gt=0)
    """Pairs after which the generator stops, for speed; none = where it ends by itself."""
    cached_attributes: int = Field(100_000, ge=0)
    """Attribute texts that each ingress replica remembers."""
    max_delta_items: int = Field(10_000, gt=0)
    """Items put in since the index was built, above which they are merged into a new copy of it; until then they are
    searched one by one."""
    rounds_kept: int = Field(2, ge=2)
    """Rounds that a model replica holds at once: that which is served, and one to go to or to go back to."""
    cors_origins: tuple[str, ...] = ()
    """Origins that browsers may call from; none = only the page itself."""
    auth: AuthConfig = AuthConfig()
    """Who may ask."""
    limits: LimitsConfig = LimitsConfig()
    """What a request may be."""
    batching: BatchConfig = BatchConfig()
    """Of both models."""
    ingress: ReplicasConfig = ReplicasConfig(cpus=0.25, max_ongoing_requests=64, max_queued_requests=64)
    """HTTP."""
    encoder: ReplicasConfig = ReplicasConfig()
    """The embedding encoder."""
    generator: ReplicasConfig = ReplicasConfig()
    """The attribute generator."""
    index: ReplicasConfig = ReplicasConfig(cpus=0.25, max_ongoing_requests=64)
    """Search. Its replicas share `state_dir`, so they need a file system with locks that all of them see."""

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, values: Any) -> Any:
        """`serve run` hands over `auth.keys_file=...` as one flat key."""
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
