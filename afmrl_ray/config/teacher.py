"""Settings of teachers, the sources of distillation labels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from afmrl_ray.config.base import Section


class ColumnTeacherConfig(Section):
    """The catalogue's column `attributes`."""

    kind: Literal["column"] = "column"
    """Kind of the teacher."""
    names: tuple[str, ...] | None = None
    """Names of the attributes that are used, in this order; none = all, in the catalogue's order."""


class OpenAITeacherConfig(Section):
    """An endpoint with OpenAI's chat completions API."""

    runtime_only = frozenset({"api_key_env", "concurrency", "timeout_s", "max_retries", "backoff_s"})

    kind: Literal["openai"] = "openai"
    """Kind of the teacher."""
    base_url: str
    """URL up to and including /v1."""
    model: str
    """Model name in the requests."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key; none = no key is sent."""
    prompt: str = (
        "List the key attributes of this product as 'name: value; name: value', lower case, nothing else. "
        "Title: {title}"
    )
    """Text sent with the image; {title} is replaced by the item's title."""
    max_tokens: int = Field(256, gt=0)
    """Maximum length of an answer, tokens."""
    concurrency: int = Field(8, gt=0)
    """Largest number of concurrent requests."""
    timeout_s: float = Field(60, gt=0)
    """Timeout of a request, seconds."""
    max_retries: int = Field(5, ge=0)
    """Number of retries of a request after status 408, 429, 5xx, a timeout or a connection error."""
    backoff_s: float = Field(1.0, gt=0)
    """Wait before the first retry, seconds; doubles with each retry, up to 60 s. A longer Retry-After is respected."""


class ModelTeacherConfig(Section):
    """A checkpoint of the generator's architecture, run by the annotation code."""

    kind: Literal["model"] = "model"
    """Kind of the teacher."""
    path: str
    """Checkpoint: local folder, URI or hub name."""


TeacherConfig = Annotated[ColumnTeacherConfig | OpenAITeacherConfig | ModelTeacherConfig, Field(discriminator="kind")]
