"""The embedding encoder: Qwen2-VL without its language-model head, pooled at the last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from afmrl_ray.models.last_token import last_token_only
from afmrl_ray.models.shared_prefix import Packed
from afmrl_ray.models.unwrap import unwrap_model


class EmbeddingModel(nn.Module):
    """Wraps a (PEFT-wrapped) `Qwen2VLForConditionalGeneration` so that its forward pass returns embeddings.

    The language-model head is not run, and the last layer only for the last token.

    Args:
        backbone: the model.
        temperature: initial value of a learned temperature; none = the temperature is not learned.
    """

    def __init__(self, backbone: Any, temperature: float | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.log_temperature = nn.Parameter(torch.tensor([temperature]).log()) if temperature is not None else None

    def forward(self, **batch: Tensor) -> Tensor:
        """Embed a left-padded batch of `models.model_input.collate`, with images before or after the vision tower.

        Returns:
            [B, D] float32, of unit length; with a learned temperature [B, D + 1] with its logarithm in the last column,
            so that its gradient passes through micro-batches and workers together with that of the embeddings.
        """
        model = unwrap_model(self.backbone).model
        with last_token_only(model.language_model):
            hidden = model(**_with_images(batch), use_cache=False).last_hidden_state
        embeddings = functional.normalize(hidden[:, -1].float(), dim=-1)
        if self.training and batch.get("image_grid_thw") is None:
            embeddings = embeddings + self._unused_vision()
        if self.log_temperature is None:
            return embeddings
        return torch.cat([embeddings, self.log_temperature.float().expand(len(embeddings), 1)], dim=1)

    def _unused_vision(self) -> Tensor | float:
        """Zero that depends on the vision tower, where it is trained and a batch has no image.

        ZeRO reduces gradients as they are computed; a worker without images would take part in other collective calls
        than the others.
        """
        tower = unwrap_model(self.backbone).model.visual
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            return 0.0
        config, device = tower.config, self.device
        side = config.spatial_merge_size
        size = config.in_channels * config.temporal_patch_size * config.patch_size**2
        pixels = torch.zeros(side * side, size, device=device, dtype=next(tower.parameters()).dtype)
        features = tower(pixels, grid_thw=torch.tensor([[1, side, side]], device=device)).pooler_output
        return 0.0 * sum(
            part.float().sum() for part in (features if isinstance(features, tuple | list) else [features])
        )

    def embed_packed(self, packed: Packed) -> Tensor:
        """Embed sequences that share prefixes; the result is that of padded sequences, one for each continuation.

        Args:
            packed: from `models.shared_prefix.pack`; `use_shared_prefix` must have been applied to the backbone.

        Returns:
            [K, D] float32, of unit length.
        """
        model = unwrap_model(self.backbone).model
        hidden = model(**_with_images(packed.inputs), use_cache=False).last_hidden_state[0]
        last = packed.places.gather(1, packed.mask.sum(1, keepdim=True) - 1)[:, 0]
        return functional.normalize(hidden[last].float(), dim=-1)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _with_images(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of transformers' model: `image_features` are passed as the output of the vision tower."""
    given = dict(batch)
    features = given.pop("image_features", None)
    if features is not None:
        given["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=(features,))}
    return given
