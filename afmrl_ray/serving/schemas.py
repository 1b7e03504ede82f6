"""Bodies of requests and answers; limits that a deployment sets are checked by `limits.Limits`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

AttributesSource = Literal["generated", "given", "none"]

_PICTURE = "JPEG, PNG or WebP in base64; a data URL is taken too."


class Body(BaseModel):
    """A request's body: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class FiltersBody(Body):
    """What hits must be."""

    category: str | None = Field(None, description="Their category.")
    attributes: dict[str, str] = Field(default_factory=dict, description="Pairs that each of them has.")


class ItemContent(Body):
    """An item: an image, a title or both."""

    image: str | None = Field(None, description=_PICTURE)
    title: str = Field("", description="The seller's text.")


class SearchBody(ItemContent):
    """A search."""

    k: int = Field(10, ge=1, description="Hits wanted.")
    attributes_source: AttributesSource | None = Field(
        None, description="Where the attributes come from; by default what the deployment is set to, or given ones."
    )
    attributes: dict[str, str] | None = Field(None, description="For `attributes_source: given`.")
    filters: FiltersBody = Field(default_factory=FiltersBody)


class HitBody(BaseModel):
    """A hit; `thumbnail` is its image's address."""

    item_id: str
    score: float
    title: str
    category: str | None
    product_id: str | None
    attributes: dict[str, str]
    thumbnail: str


class AttributesUsed(BaseModel):
    """Attributes as they went into the encoder; `reason` says why there are none."""

    attributes: dict[str, str]
    attributes_source: AttributesSource
    reason: str | None = None
    cached: bool = False


class SearchAnswer(AttributesUsed):
    """Hits, best first, and what they were found with."""

    hits: list[HitBody]
    round: int
    bundle: str
    milliseconds: dict[str, float]


class AttributesAnswer(AttributesUsed):
    """What the generator writes."""

    round: int
    bundle: str


class ItemInput(ItemContent):
    """An input for an embedding beyond plain text."""

    attributes: dict[str, str] | None = Field(None, description="For `attributes_source: given`.")
    attributes_source: AttributesSource = Field("none", description="Where the attributes come from.")


class EmbeddingsBody(Body):
    """OpenAI's request for embeddings, extended by items."""

    input: str | list[str] | ItemInput | list[ItemInput] = Field(description="Texts, or items.")
    model: str = Field("afmrl", description="`afmrl`, or the key of the served bundle, to be sure of it.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Only the model's own number.")
    user: str | None = Field(None, description="Ignored.")


class EmbeddingBody(BaseModel):
    """One embedding: numbers, or their little-endian float32 bytes in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens, visual ones counted."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """OpenAI's answer."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: Usage


class ItemBody(ItemContent):
    """An item to be put in; one of the same id is replaced."""

    item_id: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._:~-]+$")
    category: str | None = Field(None, max_length=200)
    product_id: str | None = Field(None, max_length=200)
    attributes: dict[str, str] | None = Field(None, description="None = the generator writes them.")


class ItemAnswer(AttributesUsed):
    """An item as it is searched."""

    item_id: str
    title: str
    category: str | None
    product_id: str | None
    thumbnail: str


class RolloverBody(Body):
    """Where to go."""

    round: int | None = Field(None, ge=0, le=100_000, description="None = the last round that was promoted.")


class RolloverAnswer(BaseModel):
    """What took over; `embedded` items had been put in and were embedded anew."""

    served: str
    before: str
    embedded: int


class ModelAnswer(BaseModel):
    """What is served."""

    round: int
    bundle: str
    rolling: str | None
    history: list[str]
    fingerprints: dict[str, str]
    metrics: dict[str, Any]
    dimensions: int
    items: int
    limits: dict[str, float]
    attributes_source: AttributesSource
