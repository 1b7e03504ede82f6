"""Settings of the two models, their adapters and optimizers, and of tiny checkpoints in place of published ones."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from afmrl_ray.config.base import Section

LANGUAGE_PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


class ImageConfig(Section):
    """Pixel budget of an image, which determines its number of visual tokens."""

    min_pixels: int = Field(56 * 56, gt=0)
    """Smallest image, pixels; smaller ones are enlarged."""
    max_pixels: int = Field(448 * 448, gt=0)
    """Largest image, pixels; larger ones are shrunk."""

    @model_validator(mode="after")
    def _ordered(self) -> ImageConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError("min_pixels is above max_pixels")
        return self


class VisionCacheConfig(Section):
    """Cache of the encoder's frozen vision tower: visual tokens of images on each node's disk."""

    runtime_only = frozenset({"enabled", "folder", "max_gb"})

    enabled: bool = False
    """Whether visual tokens are cached, so that each image passes the tower once; results differ by rounding only."""
    folder: str | None = None
    """Local folder, the same path on every node; none = in the system's folder for temporary files."""
    max_gb: float = Field(20, gt=0)
    """Size limit, GB: above it the least recently read files are removed; processes check it every 64 images."""


class DualEncoderConfig(Section):
    """Training objectives of an encoder of kind `dual_encoder`; a weight of 0 switches one off."""

    pair_weight: float = Field(1.0, ge=0)
    """Weight of the contrastive loss between items, each the normalised sum of its image's and its text's vector."""
    image_text_weight: float = Field(1.0, ge=0)
    """Weight of CLIP's objective: images retrieve the texts of their items and vice versa."""
    region_weight: float = Field(0.0, ge=0)
    """Weight of FG-CLIP's objective on regions: a region of the query's image and the attributes of that part retrieve
    each other. Needs attributes and `boxes_column`; items without either are left out and counted."""
    hard_text_weight: float = Field(0.0, ge=0)
    """Weight of FG-CLIP's objective on hard texts: the query's image selects its attribute text among changed ones.
    Needs attributes."""
    hard_texts: int = Field(4, gt=0)
    """Changed texts per query; in each, the value of one attribute is replaced by another of the same name."""
    boxes_column: str = "boxes"
    """Column with the boxes of an image's parts, a JSON object: part to left, top, right, bottom, as fractions of the
    image's width and height."""
    region_attributes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Attribute names of each part; a part that is not listed has the attribute of its own name."""


class EncoderConfig(Section):
    """The embedding encoder (Qwen2-VL): one vector for image, title and attributes of an item."""

    kind: Literal["qwen2_vl", "dual_encoder"] = "qwen2_vl"
    """Architecture: `qwen2_vl`; or `dual_encoder`, a CLIP or SigLIP checkpoint for comparison, trained by the
    objectives of section `dual_encoder`. Image size and text length are then the checkpoint's; RAR cannot use it."""
    path: str | None = None
    """Local folder, URI or hub name of the checkpoint, or `package:<name>` for a packaged one; none = a
    tiny one is made by the run."""
    image: ImageConfig = ImageConfig()
    """Pixel budget."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and activations; similarities are always float32."""
    instruction: str = "Represent the product."
    """Text between image and title; the embedding is the hidden state of the last token, after all of them."""
    max_tokens: int = Field(2048, gt=0)
    """Longest input, tokens; text is cut at its end to fit, an image never is."""
    vision_cache: VisionCacheConfig = VisionCacheConfig()
    """Cache of the frozen vision tower's outputs."""
    dual_encoder: DualEncoderConfig = DualEncoderConfig()
    """Objectives for kind `dual_encoder`."""

    def fingerprinted(self) -> dict[str, Any]:
        """See `Section.fingerprinted`; without the settings of dual encoders for Qwen2-VL, which does not read them."""
        found = super().fingerprinted()
        return (
            found
            if self.kind == "dual_encoder"
            else {k: v for k, v in found.items() if k not in ("kind", "dual_encoder")}
        )

    @property
    def role(self) -> Literal["encoder", "dual_encoder"]:
        """Role of its checkpoint, see `models.backbones.ARCHITECTURES`."""
        return "dual_encoder" if self.kind == "dual_encoder" else "encoder"


class GeneratorConfig(Section):
    """The attribute generator (Qwen2.5-VL): writes attribute text for image and title of an item."""

    path: str | None = None
    """Local folder, URI or hub name of the checkpoint, or `package:<name>` for a packaged one; none = a
    tiny one is made by the run."""
    image: ImageConfig = ImageConfig()
    """Pixel budget."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and activations; losses are always float32."""
    inputs: Literal["image", "text", "both"] = "both"
    """Inputs from an item: its image, its title, or both."""
    title_columns: tuple[str, ...] = ("title",)
    """Columns whose texts, joined by a space, are the title in the prompt."""
    instruction: str = "List the key attributes."
    """Text after image and title in the prompt."""
    max_prompt_tokens: int = Field(2048, gt=0)
    """Longest prompt, tokens; items with a longer one are dropped at load and counted, never truncated."""
    max_new_tokens: int = Field(128, gt=0)
    """Longest completion, tokens; one that does not end within them is invalid."""
    max_attributes: int = Field(16, gt=0)
    """Largest number of attribute pairs of a valid completion."""
    unique_names: bool = True
    """Whether sampling, annotation and serving forbid tokens that would repeat an attribute name of the completion,
    which makes it invalid. Log-probabilities are recorded without this mask. `rar.rollout.engine` vllm samples without
    it, with a warning, since the interface of vLLM's logits processors differs between its versions."""


class AdapterConfig(Section):
    """Trained parameters of a model."""

    kind: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank adapters of the projections matched by `targets`. `full` trains all weights of the
    language model (of a dual encoder: all outside its image tower), those of the vision tower only with
    `train_vision`."""
    r: int = Field(16, gt=0)
    """For `lora`: rank of the adapters."""
    alpha: int = Field(32, gt=0)
    """For `lora`: the adapters' output is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """For `lora`: dropout probability of the adapters' input."""
    rslora: bool = False
    """For `lora`: scale by alpha / sqrt(r) instead of alpha / r, so that one learning rate fits all ranks (rsLoRA)."""
    dora: bool = False
    """For `lora`: train magnitude and direction of each weight column separately (DoRA): slower, often better at a low
    rank."""
    targets: str = LANGUAGE_PROJECTIONS
    """For `lora`: regular expression over full module names; the default matches the language model's projections."""
    train_vision: bool = False
    """For `full`: whether the vision tower is trained too; otherwise it is frozen."""

    @field_validator("targets")
    @classmethod
    def _is_a_pattern(cls, targets: str) -> str:
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets {targets!r} is no regular expression ({error}); mend it") from error
        return targets


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, relative to the learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or linear or cosine decay to zero at the last step."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises linearly to its peak."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Global norm to which gradients are clipped; 0 = no clipping."""


class TinyConfig(Section):
    """Tiny checkpoints, trained briefly at captioning and saved in the ordinary layout.

    They are made if `encoder.path` or `generator.path` is none, and loaded as any other checkpoint.
    """

    hidden_size: int = Field(128, gt=0)
    """Hidden size of the language model."""
    num_layers: int = Field(4, gt=0)
    """Layers of the language model."""
    num_heads: int = Field(4, gt=0)
    """Attention heads of the language model; it has half as many key-value heads."""
    vision_width: int = Field(64, gt=0)
    """Hidden size of the vision tower."""
    vision_depth: int = Field(3, gt=0)
    """Layers of the vision tower."""
    patch_px: int = Field(7, gt=0)
    """Side of a patch, pixels; a visual token covers two by two patches."""
    vocabulary: int = Field(1024, ge=300)
    """Entries of the byte-level BPE tokenizer that is trained on the catalogue's texts."""
    pretrain_products: int = Field(600, ge=0)
    """Products of the synthetic catalogue, disjoint from the run's, on which both models are pre-trained."""
    encoder_pretrain_steps: int = Field(300, ge=0)
    """Pre-training steps of the encoder's backbone; 0 = random weights."""
    generator_pretrain_steps: int = Field(300, ge=0)
    """Pre-training steps of the generator; 0 = random weights."""
    pretrain_batch_size: int = Field(48, gt=0)
    """Items per pre-training step."""
    pretrain_learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of the pre-training."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyConfig:
        if self.hidden_size % self.num_heads or self.num_heads % 2:
            raise ValueError(
                f"tiny.hidden_size {self.hidden_size} does not divide among num_heads {self.num_heads}, an even number"
            )
        return self
