"""One sequence before padding, and batches of them: ids, patches and M-RoPE positions as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class PixelFormat:
    """How stored pixels become the tower's input; a still image is one frame, which the tower sees several times.

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
        """What the checkpoint's image processor would do to pixels from 0 to 255."""
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
    """An image on its way into the language model: before the vision tower, or after it.

    Attributes:
        grid: (1, height, width) of the patches.
        patches: [n, channels, area] uint8 pixels in the tower's order: a fraction of what the tower takes, which a
            whole batch of images would otherwise hold in memory. None after the tower.
        pixels: how `patches` become the tower's input.
        features: [n / merge^2, D] visual tokens, after the tower.
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
    def joined(cls, rows: Sequence[ModelInput]) -> ModelInput:
        """One sequence after another, each with its own positions."""
        return cls(
            np.concatenate([row.input_ids for row in rows]),
            np.concatenate([row.token_types for row in rows]),
            np.concatenate([row.positions for row in rows], axis=1),
            tuple(visual for row in rows for visual in row.visuals),
        )


def mrope_positions(token_types: np.ndarray, grids: Sequence[tuple[int, int, int]], merge_size: int) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen2-VL and Qwen2.5-VL define them for still images.

    Text counts up by one on all three axes. An image that starts at p has time p, height p + row, width p + column,
    and text goes on at p + max(rows, columns).

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


def continuation(row: ModelInput, tokens: np.ndarray) -> ModelInput:
    """Tokens that go on after a sequence, without it: they count on from its last position."""
    start = int(row.positions.max()) + 1
    positions = np.broadcast_to(start + np.arange(len(tokens)), (3, len(tokens)))
    return ModelInput(tokens, np.zeros(len(tokens), dtype=np.int64), positions)


def append_completion(row: ModelInput, completion: np.ndarray) -> ModelInput:
    """The sequence of a prompt followed by completion tokens."""
    return ModelInput.joined([row, continuation(row, completion)])


def collate(rows: Sequence[ModelInput], pad_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Left-pad sequences into the keyword arguments of a Qwen2-VL or Qwen2.5-VL forward pass.

    Left padding puts the last token of every row in the last column, for pooling and for decoding alike.

    Returns:
        input_ids, attention_mask, mm_token_type_ids [B, L], position_ids [3, B, L], and, where any row has an image,
        image_grid_thw [images, 3] and either pixel_values [sum n, patch_dim] or, after the tower, image_features
        [visual tokens, D], which `EmbeddingModel` takes.
    """
    batch, longest = len(rows), max(len(row) for row in rows)
    input_ids = np.full((batch, longest), pad_id, dtype=np.int64)
    mask = np.zeros((batch, longest), dtype=np.int64)
    types = np.zeros((batch, longest), dtype=np.int64)
    positions = np.zeros((3, batch, longest), dtype=np.int64)
    for index, row in enumerate(rows):
        start = longest - len(row)
        input_ids[index, start:] = row.input_ids
        mask[index, start:] = 1
        types[index, start:] = row.token_types
        positions[:, index, start:] = row.positions
    out = {"input_ids": input_ids, "attention_mask": mask, "mm_token_type_ids": types, "position_ids": positions}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in out.items()}
    visuals = [visual for row in rows for visual in row.visuals]
    if visuals:
        tensors["image_grid_thw"] = torch.tensor([visual.grid for visual in visuals], device=device)
        tensors.update(_tower_side(visuals, device))
    return tensors


def _tower_side(visuals: Sequence[Visual], device: torch.device | str) -> dict[str, torch.Tensor]:
    features = [visual.features for visual in visuals if visual.features is not None]
    if features:
        assert len(features) == len(visuals), "images before and after the tower in one batch"
        return {"image_features": torch.cat(features).to(device)}
    (pixels,) = {visual.pixels for visual in visuals}  # one checkpoint made them all
    assert pixels is not None
    patches = np.concatenate([visual.patches for visual in visuals if visual.patches is not None])
    return {"pixel_values": pixels.values(torch.from_numpy(patches).to(device))}
