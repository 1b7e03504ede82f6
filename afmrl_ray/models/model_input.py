"""Model inputs as arrays (token ids, patches, M-RoPE positions), and padded batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class PixelFormat:
    """How stored pixels become the vision tower's input; a still image is one frame, repeated for the tower.

    Attributes:
        scale: of each channel.
        shift: of each channel.
        frames: times that an image is repeated.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    frames: int

    @classmethod
    def of(cls, image_processor: Any) -> PixelFormat:
        """The rescaling and normalisation of the checkpoint's image processor, for pixels from 0 to 255."""
        channels = len(image_processor.image_mean)
        mean, std = image_processor.image_mean, image_processor.image_std
        if not image_processor.do_normalize:
            mean, std = [0.0] * channels, [1.0] * channels
        factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        scale = tuple(factor / s for s in std)
        return cls(scale, tuple(-m / s for m, s in zip(mean, std, strict=True)), image_processor.temporal_patch_size)

    def values(self, patches: torch.Tensor) -> torch.Tensor:
        """[n, channels, area] uint8 to [n, channels * frames * area] float32."""
        scale = torch.tensor(self.scale, device=patches.device)[:, None]
        shift = torch.tensor(self.shift, device=patches.device)[:, None]
        pixels = torch.addcmul(shift, patches.float(), scale)
        return pixels[:, :, None].expand(-1, -1, self.frames, -1).reshape(len(patches), -1)


@dataclass(frozen=True)
class Visual:
    """An image as patches, before the vision tower, or as visual tokens, after it.

    Attributes:
        grid: (1, height, width) of the patches.
        patches: [n, channels, area] uint8 pixels in the tower's order; the tower's own float input would take several
            times the memory. None after the tower.
        pixels: how `patches` become the tower's input.
        features: [n / merge^2, D] visual tokens; none before the tower.
    """

    grid: tuple[int, int, int]
    patches: np.ndarray | None = None
    pixels: PixelFormat | None = None
    features: torch.Tensor | None = None


@dataclass(frozen=True)
class ModelInput:
    """One sequence before padding.

    Attributes:
        input_ids: [L] token ids.
        token_types: [L] 1 at visual tokens, else 0.
        positions: [3, L] M-RoPE positions (time, height, width).
        visuals: the images, in the order of their tokens.
    """

    input_ids: np.ndarray
    token_types: np.ndarray
    positions: np.ndarray
    visuals: tuple[Visual, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def joined(cls, inputs: Sequence[ModelInput]) -> ModelInput:
        """The concatenation of sequences, each with its own positions."""
        return cls(
            np.concatenate([each.input_ids for each in inputs]),
            np.concatenate([each.token_types for each in inputs]),
            np.concatenate([each.positions for each in inputs], axis=1),
            tuple(visual for each in inputs for visual in each.visuals),
        )


def mrope_positions(token_types: np.ndarray, grids: Sequence[tuple[int, int, int]], merge_size: int) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen2-VL and Qwen2.5-VL define them for still images.

    Text counts up by one on all three axes. An image that starts at p has time p, height p + row, width p + column,
    and text continues at p + max(rows, columns).

    Args:
        token_types: [L] 1 at visual tokens, else 0.
        grids: patch grid of each image in order.
        merge_size: patches per visual token along each axis.

    Returns:
        [3, L] int64.
    """
    positions = np.empty((3, len(token_types)), dtype=np.int64)
    remaining = iter(grids)
    index, start = 0, 0
    while index < len(token_types):
        if token_types[index]:
            _, height, width = next(remaining)
            rows, columns = height // merge_size, width // merge_size
            stop = index + rows * columns
            positions[0, index:stop] = start
            positions[1, index:stop] = start + np.repeat(np.arange(rows), columns)
            positions[2, index:stop] = start + np.tile(np.arange(columns), rows)
            start += max(rows, columns)
        else:
            visual = np.flatnonzero(token_types[index:])
            stop = index + int(visual[0]) if len(visual) else len(token_types)
            positions[:, index:stop] = start + np.arange(stop - index)
            start += stop - index
        index = stop
    return positions


def continuation(prompt: ModelInput, tokens: np.ndarray) -> ModelInput:
    """Tokens [n] that follow a prompt, without the prompt itself; their positions continue the prompt's."""
    start = int(prompt.positions.max()) + 1
    positions = np.broadcast_to(start + np.arange(len(tokens)), (3, len(tokens)))
    return ModelInput(tokens, np.zeros(len(tokens), dtype=np.int64), positions)


def append_completion(prompt: ModelInput, completion: np.ndarray) -> ModelInput:
    """The sequence of a prompt followed by completion tokens [n]."""
    return ModelInput.joined([prompt, continuation(prompt, completion)])


def collate(inputs: Sequence[ModelInput], pad_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Left-pad sequences into the keyword arguments of a Qwen2-VL or Qwen2.5-VL forward pass.

    Left padding puts the last token of every sequence in the last column, for pooling and for decoding alike.

    Args:
        inputs: B sequences, their images either all before or all after the vision tower.
        pad_id: padding token.
        device: of the tensors.

    Returns:
        input_ids, attention_mask, mm_token_type_ids [B, L], position_ids [3, B, L], and, if any sequence has an image,
        image_grid_thw [images, 3] and either pixel_values [sum n, patch_dim] or, after the tower, image_features
        [visual tokens, D], which `EmbeddingModel` takes.
    """
    batch, longest = len(inputs), max(len(each) for each in inputs)
    input_ids = np.full((batch, longest), pad_id, dtype=np.int64)
    mask = np.zeros((batch, longest), dtype=np.int64)
    types = np.zeros((batch, longest), dtype=np.int64)
    positions = np.zeros((3, batch, longest), dtype=np.int64)
    for row, each in enumerate(inputs):
        start = longest - len(each)
        input_ids[row, start:] = each.input_ids
        mask[row, start:] = 1
        types[row, start:] = each.token_types
        positions[:, row, start:] = each.positions
    out = {"input_ids": input_ids, "attention_mask": mask, "mm_token_type_ids": types, "position_ids": positions}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in out.items()}
    visuals = [visual for each in inputs for visual in each.visuals]
    if visuals:
        tensors["image_grid_thw"] = torch.tensor([visual.grid for visual in visuals], device=device)
        tensors.update(_image_tensors(visuals, device))
    return tensors


def _image_tensors(visuals: Sequence[Visual], device: torch.device | str) -> dict[str, torch.Tensor]:
    features = [visual.features for visual in visuals if visual.features is not None]
    if features:
        assert len(features) == len(visuals), "a batch mixes images before and after the vision tower"
        return {"image_features": torch.cat(features).to(device)}
    (pixels,) = {visual.pixels for visual in visuals}  # all of one checkpoint
    assert pixels is not None
    patches = np.concatenate([visual.patches for visual in visuals if visual.patches is not None])
    return {"pixel_values": pixels.values(torch.from_numpy(patches).to(device))}
