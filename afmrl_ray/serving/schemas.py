"""Bodies of requests and responses; the limits of a deployment are checked by `limits.Limits`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_ITEM_ID = 1000
"""Longest id of an item, characters."""
AttributesSource = Literal["generated", "given", "none"]

_IMAGE = "JPEG, PNG or WebP in base64, or a data URL of one."


class Body(BaseModel):
    """The body of a request; unknown fields are refused, and null is as if the field was left out."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in values.items() if value is not None or name not in optional}


class FiltersBody(Body):
    """Conditions that every hit meets."""

    category: str | None = Field(None, description="Category of the hits.")
    attributes: dict[str, str] = Field(default_factory=dict, description="Attributes that every hit has.")


class ItemContent(Body):
    """An item: an image, a title or both."""

    image: str | None = Field(None, description=_IMAGE)
    title: str = Field("", description="The seller's text.")


class SearchBody(ItemContent):
    """A search."""

    k: int = Field(10, ge=1, description="Number of hits.")
    attributes_source: AttributesSource | None = Field(
        None,
        description="Source of the attributes; by default `given` if there are any, else the deployment's setting.",
    )
    attributes: dict[str, str] | None = Field(None, description="For `attributes_source: given`.")
    filters: FiltersBody = Field(default_factory=FiltersBody)


class HitBody(BaseModel):
    """A hit; `score` is the cosine similarity, `thumbnail` the path of its image."""

    item_id: str
    score: float
    title: str
    category: str | None
    product_id: str | None
    attributes: dict[str, str]
    thumbnail: str


class AttributesUsed(BaseModel):
    """Attributes that the encoder was given; `reason` says why there are none."""

    attributes: dict[str, str]
    attributes_source: AttributesSource
    reason: str | None = None
    cached: bool = False


class SearchAnswer(AttributesUsed):
    """Hits, best first, and the attributes, round and bundle of the search; `milliseconds` is the time by stage."""

    hits: list[HitBody]
    round: int
    bundle: str
    milliseconds: dict[str, float]


class AttributesAnswer(AttributesUsed):
    """What the generator writes."""

    round: int
    bundle: str


class ItemInput(ItemContent):
    """An item to be embedded, instead of plain text."""

    attributes: dict[str, str] | None = Field(None, description="For `attributes_source: given`.")
    attributes_source: AttributesSource | None = Field(
        None, description="Source of the attributes; by default `given` if there are any, else `none`."
    )


class EmbeddingsBody(Body):
    """OpenAI's request for embeddings; inputs may be items too."""

    input: str | list[str] | ItemInput | list[ItemInput] = Field(description="Texts, or items.")
    model: str = Field("afmrl", description="`afmrl`, or the key of the bundle that must be served.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Must be that of the model.")
    user: str | None = Field(None, description="Ignored.")

    @field_validator("input", mode="before")
    @classmethod
    def _texts_and_not_tokens(cls, value: Any) -> Any:
        first = value[0] if isinstance(value, list) and value else value
        of_tokens = isinstance(first, list) and first and all(isinstance(each, int) for each in first)
        if isinstance(first, int) or of_tokens:
            raise ValueError(
                "token ids are not taken, since their vocabulary is another model's; send texts (LangChain: "
                "OpenAIEmbeddings(check_embedding_ctx_length=False))"
            )
        return value


class EmbeddingBody(BaseModel):
    """One embedding: numbers, or their little-endian float32 bytes in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Number of tokens, visual ones counted."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """OpenAI's response."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: Usage


class ModelCard(BaseModel):
    """A name that requests may give as their model; `created` is in seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "afmrl_ray"


class ModelsAnswer(BaseModel):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ItemBody(ItemContent):
    """An item to be upserted."""

    item_id: str = Field(
        min_length=1,
        max_length=MAX_ITEM_ID,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        description="Any text without control characters; percent-encoded in paths.",
    )
    category: str | None = Field(None, max_length=200)
    product_id: str | None = Field(None, max_length=200)
    attributes: dict[str, str] | None = Field(None, description="By default the generator writes them.")


class ItemAnswer(AttributesUsed):
    """An item as it is searched."""

    item_id: str
    title: str
    category: str | None
    product_id: str | None
    thumbnail: str


class SwitchBody(Body):
    """The round to serve."""

    round: int | None = Field(None, ge=0, le=100_000, description="By default the last promoted round.")


class SwitchAnswer(BaseModel):
    """Keys of the bundles served now and before; `embedded` upserted items were embedded for the switch."""

    served: str
    before: str
    embedded: int


class ModelAnswer(BaseModel):
    """What is served; `switching_to` is the bundle that a switch under way leads to."""

    round: int
    bundle: str
    switching_to: str | None
    history: list[str]
    fingerprints: dict[str, str]
    metrics: dict[str, Any]
    dimensions: int
    items: int
    limits: dict[str, float]
    attributes_source: AttributesSource
