"""The embedding encoder: Qwen2-VL without its language-model head, pooled at the last token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from afmrl_ray.models.inner import inner_model
from afmrl_ray.models.last_token import last_token_only
from afmrl_ray.models.shared_prefix import Packed


class EmbeddingModel(nn.Module):
    """Wraps a (PEFT-wrapped) `Qwen2VLForConditionalGeneration` so that its forward pass gives embeddings.

    Of head and last layer only what an embedding needs is run: the last token's hidden state.

    Args:
        backbone: the model.
        temperature: where a learned temperature begins; none = there is none.
    """

    def __init__(self, backbone: Any, temperature: float | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.log_temperature = nn.Parameter(torch.tensor([temperature]).log()) if temperature is not None else None

    def forward(self, **batch: Tensor) -> Tensor:
        """Embed a left-padded batch of `models.model_input.collate`, with images before or after the vision tower.

        Returns:
            [B, D] float32, of unit length; with a learned temperature [B, D + 1], its logarithm in the last column, so
            that its gradient takes the way of the embeddings' through parts and workers.
        """
        inner = inner_model(self.backbone).model
        with last_token_only(inner.language_model):
            hidden = inner(**_with_images(batch), use_cache=False).last_hidden_state
        embeddings = functional.normalize(hidden[:, -1].float(), dim=-1)
        if self.log_temperature is None:
            return embeddings
        return torch.cat([embeddings, self.log_temperature.float().expand(len(embeddings), 1)], dim=1)

    def embed_packed(self, packed: Packed) -> Tensor:
        """Embed the continuations of shared prefixes: what rows of their own would give.

        Args:
            packed: from `models.shared_prefix.pack`; the backbone must have been given to `use_shared_prefix`.

        Returns:
            [K, D] float32, of unit length.
        """
        inner = inner_model(self.backbone).model
        hidden = inner(**_with_images(packed.inputs), use_cache=False).last_hidden_state[0]
        last = packed.places.gather(1, packed.mask.sum(1, keepdim=True) - 1)[:, 0]
        return functional.normalize(hidden[last].float(), dim=-1)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _with_images(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the inner model takes: images after the vision tower go in as its output."""
    given = dict(batch)
    features = given.pop("image_features", None)
    if features is not None:
        given["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=(features,))}
    return given
