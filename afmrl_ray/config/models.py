"""Settings of the two models, their adapters and optimizers, and of tiny checkpoints that stand in for real ones."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from afmrl_ray.config.base import Section

LANGUAGE_PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


class ImageConfig(Section):
    """Pixel budget of an image, which decides its number of visual tokens."""

    min_pixels: int = Field(56 * 56, gt=0)
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = Field(448 * 448, gt=0)
    """Larger images are shrunk to this many pixels."""

    @model_validator(mode="after")
    def _ordered(self) -> ImageConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError("min_pixels is above max_pixels")
        return self


class VisionCacheConfig(Section):
    """Outputs of the encoder's vision tower on each node's disk, where the tower is frozen."""

    runtime_only = frozenset({"enabled", "folder", "max_gb"})

    enabled: bool = False
    """Whether they are kept: each image then goes through the tower once. Results differ by rounding only."""
    folder: str | None = None
    """Local folder, the same on every node; none = in the system's folder for temporary files."""
    max_gb: float = Field(20, gt=0)
    """Size above which what was not read for the longest time is removed, GB; processes look every 64 images."""


class DualEncoderConfig(Section):
    """What an encoder of kind `dual_encoder` is trained on; weights of 0 switch one off."""

    pair_weight: float = Field(1.0, ge=0)
    """Of InfoNCE between items, each the sum of its image's and its text's vector."""
    image_text_weight: float = Field(1.0, ge=0)
    """Of CLIP's own objective: the image of an item against its text, both ways."""
    region_weight: float = Field(0.0, ge=0)
    """Of FG-CLIP's: a region of the query's image against what the attributes say of that part; needs attributes and
    `boxes_column`. Items without are left out and counted."""
    hard_text_weight: float = Field(0.0, ge=0)
    """Of FG-CLIP's: the query's image against its attribute text and changed ones; needs attributes."""
    hard_texts: int = Field(4, gt=0)
    """Changed texts of a query; in each, one attribute has another value that the catalogue knows for its name."""
    boxes_column: str = "boxes"
    """Column with the boxes of an image's parts, a JSON object: part to left, top, right, bottom, as shares."""
    region_attributes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Names of the attributes that belong to a part; a part that is not named here has the one of its own name."""


class EncoderConfig(Section):
    """The embedding encoder (Qwen2-VL): image, title and attributes to one vector."""

    kind: Literal["qwen2_vl", "dual_encoder"] = "qwen2_vl"
    """`dual_encoder`: a CLIP or SigLIP checkpoint for comparison, with objectives of its own (section `dual_encoder`);
    pixels and text length are the checkpoint's, and RAR cannot search with it."""
    path: str | None = None
    """Local folder, URI or hub name of the checkpoint; none = the run makes a tiny one."""
    image: ImageConfig = ImageConfig()
    """Pixel budget."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and activations; similarities are always float32."""
    instruction: str = "Represent the product."
    """Text before the item; last-token pooling reads what the model makes of it."""
    max_tokens: int = Field(2048, gt=0)
    """Longest input; text is cut to fit, an image never is."""
    vision_cache: VisionCacheConfig = VisionCacheConfig()
    """Images that went through the frozen vision tower."""

    dual_encoder: DualEncoderConfig = DualEncoderConfig()
    """For kind `dual_encoder`."""

    def fingerprinted(self) -> dict[str, Any]:
        """As everywhere; what only dual encoders read decides nothing about Qwen2-VL."""
        found = super().fingerprinted()
        return (
            found
            if self.kind == "dual_encoder"
            else {k: v for k, v in found.items() if k not in ("kind", "dual_encoder")}
        )

    @property
    def role(self) -> Literal["encoder", "dual_encoder"]:
        """What its checkpoint must be."""
        return "dual_encoder" if self.kind == "dual_encoder" else "encoder"


class GeneratorConfig(Section):
    """The attribute generator (Qwen2.5-VL): image and title to attribute text."""

    path: str | None = None
    """Local folder, URI or hub name of the checkpoint; none = the run makes a tiny one."""
    image: ImageConfig = ImageConfig()
    """Pixel budget."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and activations; losses are always float32."""
    inputs: Literal["image", "text", "both"] = "both"
    """What of an item the generator sees."""
    title_columns: tuple[str, ...] = ("title",)
    """Columns whose texts, joined by a space, are the title that the generator reads."""
    instruction: str = "List the key attributes."
    """Text after the item in the prompt."""
    max_prompt_tokens: int = Field(2048, gt=0)
    """Items whose prompt is longer are dropped at load and counted, never truncated."""
    max_new_tokens: int = Field(128, gt=0)
    """Longest completion; one without an end by then is invalid."""
    max_attributes: int = Field(16, gt=0)
    """More pairs than this make a completion invalid."""


class AdapterConfig(Section):
    """What of a model is trained."""

    kind: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank adapters on the projections matched by `targets`; `full` trains every weight."""
    r: int = Field(16, gt=0)
    """Rank of the adapters."""
    alpha: int = Field(32, gt=0)
    """Scale of the adapters, relative to the rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r, so that the learning rate need not follow the rank."""
    dora: bool = False
    """Train the length of each weight column apart from its direction (DoRA): slower, often better at a low rank."""
    targets: str = LANGUAGE_PROJECTIONS
    """Regular expression over full module names; the default is the language model's projections only."""
    train_vision: bool = False
    """With `full`: whether the vision tower is trained too."""


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up: constant, or decay to zero at the last step."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 = no clipping."""


class TinyConfig(Section):
    """Tiny checkpoints from a config, trained briefly at captioning, saved as ordinary ones.

    They are made when `encoder.path` or `generator.path` is none, and are loaded as any other checkpoint.
    """

    hidden_size: int = Field(128, gt=0)
    """Width of the language model."""
    num_layers: int = Field(4, gt=0)
    """Layers of the language model."""
    num_heads: int = Field(4, gt=0)
    """Attention heads; half as many key-value heads."""
    vision_width: int = Field(64, gt=0)
    """Width of the vision tower."""
    vision_depth: int = Field(3, gt=0)
    """Layers of the vision tower."""
    patch_px: int = Field(7, gt=0)
    """Side of a patch, pixels; a visual token covers two by two."""
    vocabulary: int = Field(1024, ge=300)
    """Entries of the byte-level BPE tokenizer that is trained on the catalogue's texts."""
    pretrain_products: int = Field(600, ge=0)
    """Products of the disjoint synthetic catalogue on which both are pre-trained."""
    encoder_pretrain_steps: int = Field(300, ge=0)
    """Captioning steps of the encoder's backbone; 0 leaves random weights."""
    generator_pretrain_steps: int = Field(300, ge=0)
    """Captioning steps of the generator; 0 leaves random weights."""
    pretrain_batch_size: int = Field(48, gt=0)
    """Items per captioning step."""
    pretrain_learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of the captioning."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyConfig:
        if self.hidden_size % self.num_heads or self.num_heads % 2:
            raise ValueError(
                f"tiny.hidden_size {self.hidden_size} does not divide among num_heads {self.num_heads}, an even number"
            )
        return self
