"""The embedding encoder: Qwen2-VL without its language-model head, pooled at the last token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from afmrl_ray.models.backbones import inner_model


class EmbeddingModel(nn.Module):
    """Wraps a (PEFT-wrapped) `Qwen2VLForConditionalGeneration` so that its forward pass gives embeddings.

    The head is never run: only the inner model's last hidden state is computed.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, **batch: Tensor) -> Tensor:
        """Embed a left-padded batch of `models.listing.collate`.

        Returns:
            [B, D] float32, of unit length.
        """
        hidden = inner_model(self.backbone).model(**batch, use_cache=False).last_hidden_state
        return functional.normalize(hidden[:, -1].float(), dim=-1)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
