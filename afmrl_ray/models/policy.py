"""The generator as a module whose forward pass gives log-probabilities, which is what trainings differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from afmrl_ray.models.logprobs import completion_logprobs, packed_logprobs
from afmrl_ray.models.shared_prefix import Packed


class Policy(nn.Module):
    """Wraps a (PEFT-wrapped) `Qwen2_5_VLForConditionalGeneration`."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        batch: dict[str, Tensor] | Packed,
        mask: Tensor,
        *,
        forbidden_ids: Sequence[int] = (),
        temperature: float = 1.0,
    ) -> Tensor:
        """Log-probabilities [B, C] of the completions, see `models.logprobs`.

        Args:
            batch: rows of prompt and completion, or a packed sequence with its own mask as `mask`.
        """
        how: dict[str, Any] = {"forbidden_ids": forbidden_ids, "temperature": temperature}
        if isinstance(batch, Packed):
            return packed_logprobs(self.backbone, batch, **how)
        return completion_logprobs(self.backbone, batch, mask, **how)
