"""Settings of where distillation labels come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from afmrl_ray.config.base import Section


class ColumnTeacherConfig(Section):
    """The catalogue's own `attributes` column."""

    kind: Literal["column"] = "column"
    """Discriminates the teachers."""
    names: tuple[str, ...] | None = None
    """Attributes that are taken, in this order; none = all, in the catalogue's order."""


class OpenAITeacherConfig(Section):
    """Any endpoint that speaks OpenAI's chat completions."""

    runtime_only = frozenset({"api_key_env", "concurrency", "timeout_s", "max_retries", "backoff_s"})

    kind: Literal["openai"] = "openai"
    """Discriminates the teachers."""
    base_url: str
    """Address up to and including /v1."""
    model: str
    """Model name sent with every request."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; none = no key is sent."""
    prompt: str = (
        "List the key attributes of this product as 'name: value; name: value', lower case, nothing else. "
        "Title: {title}"
    )
    """Text sent with the image; {title} is replaced."""
    max_tokens: int = Field(256, gt=0)
    """Longest answer, tokens."""
    concurrency: int = Field(8, gt=0)
    """Requests in flight."""
    timeout_s: float = Field(60, gt=0)
    """Deadline of one request, seconds."""
    max_retries: int = Field(5, ge=0)
    """Times that a request is tried again after 429, 5xx or a timeout."""
    backoff_s: float = Field(1.0, gt=0)
    """First wait before trying again, seconds; doubled each time, up to a minute; Retry-After can prolong it."""


class ModelTeacherConfig(Section):
    """A local checkpoint of the generator's architecture, through the annotate path."""

    kind: Literal["model"] = "model"
    """Discriminates the teachers."""
    path: str
    """Local folder, URI or hub name of the checkpoint."""


TeacherConfig = Annotated[ColumnTeacherConfig | OpenAITeacherConfig | ModelTeacherConfig, Field(discriminator="kind")]
