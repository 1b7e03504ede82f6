"""The settings that a model was trained with, in `afmrl.json` beside its weights.

Whoever uses a trained model reads them from its folder, so a model that is copied elsewhere keeps its prompt, pixel
budget and limits, and nothing that is configured later can change them. The module imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from afmrl_ray import storage
from afmrl_ray.config.catalogue import Inputs
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig, ImageConfig
from afmrl_ray.errors import CheckpointError, StorageError
from afmrl_ray.runs.records import rerun_advice

SETTINGS_FILE = "afmrl.json"
SCHEMA_VERSION: Literal[1] = 1
DType = Literal["float32", "bfloat16"]
_ADAPTER_CONFIG = "adapter_config.json"


class ModelSettings(BaseModel):
    """What all models record; the subclasses add what they read of an item.

    Attributes:
        schema_version: of the file.
        role: what the model is for.
        kind: architecture; decides the subclass.
        dtype: of the weights and activations in training.
        base: checkpoint that an adapter was trained on, as its `adapter_config.json` named it when it was written; None
            for a whole model. A record only: an adapter is loaded on what its `adapter_config.json` names now.
        catalogue: fingerprint of the catalogue; None for a checkpoint that was not trained on one.
        upstream: fingerprints of the stages that the training read, by name.
        package_version: of the `afmrl_ray` that wrote the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1]
    role: Literal["encoder", "generator"]
    kind: str
    dtype: DType
    base: str | None
    catalogue: str | None
    upstream: dict[str, str]
    package_version: str

    @property
    def checkpoint_role(self) -> str:
        """The role under which `models.adapters.load_trained` loads the weights."""
        return self.role

    def write(self, folder: str) -> None:
        """Write the file beside the weights that `folder`, a path or URI, holds already.

        Raises:
            StorageError: the folder cannot be written.
        """
        written = self.model_copy(update={"base": _adapter_base(folder)})
        storage.write_json(storage.join(folder, SETTINGS_FILE), written.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: str) -> Self:
        """Read the settings of a model folder; a subclass reads its own kind only.

        Args:
            folder: path or URI.

        Raises:
            CheckpointError: the file is missing, damaged or of another schema version, or the model of another kind.
        """
        path = storage.join(folder, SETTINGS_FILE)
        if not has_settings(folder):
            raise CheckpointError(
                f"{folder} has no {SETTINGS_FILE}, the settings that a model was trained with; {_retrain(folder)}"
            )
        try:
            values = storage.read_json(path)
        except (StorageError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); restore it from a copy, or {_retrain(folder)}"
            ) from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version not in (None, SCHEMA_VERSION):
            raise CheckpointError(
                f"{path} has schema version {version!r}, this version of afmrl_ray reads {SCHEMA_VERSION}; use "
                f"afmrl_ray {values.get('package_version')}, or {_retrain(folder)}"
            )
        try:
            found = _ANY.validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(
                f"{path} is damaged ({where}: {first['msg']}); restore it from a copy, or {_retrain(folder)}"
            ) from error
        if not isinstance(found, cls):
            wanted = cls.model_fields["kind"].default
            raise CheckpointError(f"{folder} holds a model of kind {found.kind}, where {wanted} is needed")
        return found


class EncoderSettings(ModelSettings):
    """An encoder of kind `qwen2_vl`; the fields are those of `config.models.EncoderConfig`."""

    role: Literal["encoder"] = "encoder"
    kind: Literal["qwen2_vl"] = "qwen2_vl"
    instruction: str
    min_pixels: int
    max_pixels: int
    max_tokens: int

    @property
    def image(self) -> ImageConfig:
        """The pixel budget of an image."""
        return ImageConfig(min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def config(self) -> EncoderConfig:
        """The config section that shows items to the encoder as in its training."""
        return EncoderConfig(
            dtype=self.dtype, instruction=self.instruction, image=self.image, max_tokens=self.max_tokens
        )


class DualEncoderSettings(ModelSettings):
    """An encoder of kind `dual_encoder`, whose pixels and text length are those of its checkpoint."""

    role: Literal["encoder"] = "encoder"
    kind: Literal["dual_encoder"] = "dual_encoder"

    @property
    def checkpoint_role(self) -> str:
        return self.kind


class GeneratorSettings(ModelSettings):
    """An attribute generator; the fields are those of `config.models.GeneratorConfig`."""

    role: Literal["generator"] = "generator"
    kind: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    instruction: str
    min_pixels: int
    max_pixels: int
    inputs: Inputs
    title_columns: tuple[str, ...]
    max_prompt_tokens: int
    max_new_tokens: int
    max_attributes: int
    # Models that were trained before the setting existed are used as they were then.
    unique_names: bool = False

    @property
    def image(self) -> ImageConfig:
        """The pixel budget of an image."""
        return ImageConfig(min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def config(self) -> GeneratorConfig:
        """The config section that shows items to the generator as in its training."""
        return GeneratorConfig(
            dtype=self.dtype,
            instruction=self.instruction,
            image=self.image,
            inputs=self.inputs,
            title_columns=self.title_columns,
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            max_attributes=self.max_attributes,
            unique_names=self.unique_names,
        )


_ANY: TypeAdapter[Any] = TypeAdapter(
    Annotated[EncoderSettings | DualEncoderSettings | GeneratorSettings, Field(discriminator="kind")]
)


def has_settings(folder: str) -> bool:
    """Whether a model folder, a path or URI, has settings that `ModelSettings.read` may read."""
    return storage.exists(storage.join(folder, SETTINGS_FILE))


def encoder_settings(
    config: EncoderConfig, *, catalogue: str | None, upstream: Mapping[str, str]
) -> EncoderSettings | DualEncoderSettings:
    """Settings of an encoder that is trained with `config`; see `ModelSettings` for the other arguments."""
    if config.kind == "dual_encoder":
        return DualEncoderSettings(dtype=config.dtype, **_provenance(catalogue, upstream))
    return EncoderSettings(
        dtype=config.dtype,
        instruction=config.instruction,
        min_pixels=config.image.min_pixels,
        max_pixels=config.image.max_pixels,
        max_tokens=config.max_tokens,
        **_provenance(catalogue, upstream),
    )


def generator_settings(
    config: GeneratorConfig, *, catalogue: str | None, upstream: Mapping[str, str]
) -> GeneratorSettings:
    """Settings of a generator that is trained with `config`; see `ModelSettings` for the other arguments."""
    return GeneratorSettings(
        dtype=config.dtype,
        instruction=config.instruction,
        min_pixels=config.image.min_pixels,
        max_pixels=config.image.max_pixels,
        inputs=config.inputs,
        title_columns=config.title_columns,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        max_attributes=config.max_attributes,
        unique_names=config.unique_names,
        **_provenance(catalogue, upstream),
    )


def _provenance(catalogue: str | None, upstream: Mapping[str, str]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "base": None,
        "catalogue": catalogue,
        "upstream": dict(upstream),
        "package_version": metadata.version("afmrl_ray"),
    }


def _retrain(folder: str) -> str:
    return rerun_advice(folder) or "train the model again with this version of afmrl_ray"


def _adapter_base(folder: str) -> str | None:
    path = storage.join(folder, _ADAPTER_CONFIG)
    return storage.read_json(path).get("base_model_name_or_path") if storage.exists(path) else None
