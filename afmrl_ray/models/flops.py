"""Floating-point operations that a training step of the encoder needs, for model FLOPs utilisation (MFU).

A multiplication with an addition counts as two. Only matrix products count, attention over whole sequences (as in
torch's counter and appendix B of PaLM). Padding and GradCache's second forward pass do not count: the number is what
the step needs, not what it executes. The encoder's last layer needs keys and values of all tokens, and everything else
of one (`models.last_token`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from afmrl_ray.models.unwrap import unwrap_model

PEAK_TFLOPS_BF16 = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}
"""Dense bfloat16 peak by a part of the device's name, the longer names of a family first (NVIDIA's data sheets)."""


class Image(Protocol):
    """The fields of `models.model_input.Visual` that the count depends on."""

    @property
    def grid(self) -> tuple[int, int, int]: ...

    @property
    def features(self) -> Any: ...


class TokenSequence(Protocol):
    """The fields of `models.model_input.ModelInput` that the count depends on."""

    def __len__(self) -> int: ...

    @property
    def visuals(self) -> Sequence[Image]: ...


def peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 peak of a GPU in TFLOP/s; none if it is not known."""
    return next((peak for part, peak in PEAK_TFLOPS_BF16.items() if part in device_name), None)


class EncoderFlops:
    """FLOPs of training steps of one model.

    It reads the shapes of all weights and which of them are trained: make it before weights are sharded (ZeRO 3).

    Args:
        model: a (PEFT-wrapped) `Qwen2VLForConditionalGeneration`.
    """

    def __init__(self, model: Any) -> None:
        whole = unwrap_model(model).model
        tower, text = whole.visual, whole.language_model
        layer, block = text.layers[0], tower.blocks[0]
        self._layers, self._blocks = len(text.layers), len(tower.blocks)
        self._attended = text.config.num_attention_heads * layer.self_attn.head_dim
        self._key_value = _weights(layer, "k_proj", "v_proj")
        self._layer, self._block = _weights(layer), _weights(block)
        self._width = block.norm1.normalized_shape[0]
        self._patch = tower.patch_embed.proj.weight.numel()
        self._merger = _weights(tower.merger)
        self._merge = tower.spatial_merge_size**2
        self._text_backward, self._tower_backward = _backward(text), _backward(tower)

    def step(self, inputs: Sequence[TokenSequence]) -> float:
        """FLOPs of the forward and backward passes over a step's inputs."""
        return sum(self._text(len(sequence)) + self._tower(sequence) for sequence in inputs)

    def _text(self, tokens: int) -> float:
        whole, last = self._layers - 1, 1
        weights = whole * tokens * self._layer + tokens * self._key_value + last * (self._layer - self._key_value)
        attention = 2 * (whole * tokens**2 + last * tokens) * self._attended
        return 2 * weights * (1 + self._text_backward) + 2 * attention * (3 if self._text_backward else 1)

    def _tower(self, sequence: TokenSequence) -> float:
        return sum(self._image(visual) for visual in sequence.visuals if visual.features is None)

    def _image(self, visual: Image) -> float:
        patches = visual.grid[1] * visual.grid[2]
        weights = patches * self._blocks * self._block + patches // self._merge * self._merger
        # No gradient of the pixels is needed.
        first = patches * self._patch * (2 if self._tower_backward else 1)
        attention = 2 * self._blocks * patches**2 * self._width
        return 2 * (first + weights * (1 + self._tower_backward) + attention * (3 if self._tower_backward else 1))


def _weights(module: Any, *names: str) -> int:
    """Number of weights of a module's linear layers (with one of the names in theirs), without adapters."""
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and "lora_" not in name and (not names or any(part in name for part in names))
    )


def _backward(module: Any) -> int:
    """Cost of the backward pass in forward passes: one for activations, one for weights; adapters are neglected."""
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not trained:
        return 0
    return 1 if all("lora_" in name for name in trained) else 2
