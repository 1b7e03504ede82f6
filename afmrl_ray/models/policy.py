"""The generator as a module whose forward pass gives log-probabilities, which is what trainings differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from afmrl_ray.models.logprobs import completion_logprobs


class Policy(nn.Module):
    """Wraps a (PEFT-wrapped) `Qwen2_5_VLForConditionalGeneration`."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, batch: dict[str, Tensor], mask: Tensor, *, forbidden_ids: Sequence[int] = (), temperature: float = 1.0
    ) -> Tensor:
        """Log-probabilities [B, C] of the completions, see `models.logprobs.completion_logprobs`."""
        return completion_logprobs(self.backbone, batch, mask, forbidden_ids=forbidden_ids, temperature=temperature)
