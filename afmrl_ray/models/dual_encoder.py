"""Dual encoders (CLIP, SigLIP): one tower for images, one for texts; an item's vector is the sum of both.

The checkpoint is an ordinary Hugging Face folder or hub name, which decides image size, text length and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from afmrl_ray.models.item_processor import load_processors
from afmrl_ray.models.unwrap import unwrap_model


@dataclass(frozen=True)
class DualInput:
    """Model input of an item, or of anything else that has an image, a text or both; its length is that of the text.

    Attributes:
        pixels: [3, height, width] float32, or none.
        input_ids: [L] token ids, or none.
    """

    pixels: np.ndarray | None
    input_ids: np.ndarray | None

    def __len__(self) -> int:
        return len(self.input_ids) if self.input_ids is not None else 0


class DualProcessor:
    """Tokenizer and image processor of one checkpoint.

    Args:
        tokenizer: of the checkpoint.
        image_processor: of the checkpoint.
        max_tokens: longest text of the text tower.
        pad_to_max: pad every text to `max_tokens` and attend to the padding, as SigLIP was trained.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, *, max_tokens: int, pad_to_max: bool) -> None:
        self._tokenizer, self._image_processor = tokenizer, image_processor
        self._max_tokens, self._pad_to_max = max_tokens, pad_to_max

    @classmethod
    def from_pretrained(cls, path: str, model: Any) -> DualProcessor:
        """Load from the folder or hub name that `model` came from.

        Raises:
            CheckpointError: see `models.item_processor.load_processors`.
        """
        tokenizer, image_processor = load_processors(path)
        config = model.config
        return cls(
            tokenizer,
            image_processor,
            max_tokens=int(config.text_config.max_position_embeddings),
            pad_to_max=config.model_type == "siglip",
        )

    def pixels(self, image: Image.Image) -> np.ndarray:
        """[3, height, width] float32 of one image."""
        return self._image_processor(images=[image], return_tensors="np")["pixel_values"][0].astype(np.float32)

    def tokens(self, text: str) -> np.ndarray:
        """[L] token ids with the tokenizer's special ones, cut to the text tower's length, or padded to it (SigLIP)."""
        ids = self._tokenizer(text, truncation=True, max_length=self._max_tokens)["input_ids"]
        if self._pad_to_max:
            ids = [*ids, *[self._tokenizer.pad_token_id] * (self._max_tokens - len(ids))]
        return np.asarray(ids, dtype=np.int64)

    def model_input(self, image: Image.Image | None, text: str) -> DualInput:
        """The input of an item; an empty text counts as none."""
        return DualInput(self.pixels(image) if image is not None else None, self.tokens(text) if text.strip() else None)

    def collate(self, inputs: Sequence[DualInput], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Keyword arguments of `DualEncoder.forward`: images and texts of those inputs that have one, in order."""
        batch: dict[str, Tensor] = {}
        pixels = [each.pixels for each in inputs if each.pixels is not None]
        if pixels:
            batch["pixel_values"] = torch.from_numpy(np.stack(pixels)).to(device)
        texts = [each.input_ids for each in inputs if each.input_ids is not None]
        if texts:
            ids = np.full((len(texts), max(map(len, texts))), self._tokenizer.pad_token_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, text in enumerate(texts):
                ids[row, : len(text)], mask[row, : len(text)] = text, 1
            batch["input_ids"] = torch.from_numpy(ids).to(device)
            if not self._pad_to_max:
                batch["attention_mask"] = torch.from_numpy(mask).to(device)
        return batch


class DualEncoder(nn.Module):
    """Wraps a `CLIPModel` or `SiglipModel` so that its forward pass returns unit vectors of images and of texts.

    The checkpoint's logit scale (and bias) is neither used nor trained: similarities are divided by `agcl.temperature`.

    Args:
        backbone: the model, PEFT-wrapped or not.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        model = unwrap_model(backbone)
        for name in ("logit_scale", "logit_bias"):
            # DeepSpeed does not support parameters without dimensions; a buffer is saved under the same name.
            if name in model._parameters:
                model.register_buffer(name, model._parameters.pop(name).detach())

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed `pixel_values` [n, 3, height, width] and `input_ids` [m, L].

        Returns:
            Images [n, D] and texts [m, D], float32, of unit length; empty [0, D] where there are none.
        """
        images = texts = torch.zeros(0, self.dimension, device=self.device)
        if pixel_values is not None:
            found = self.backbone.get_image_features(pixel_values=pixel_values.to(self.dtype)).pooler_output
            images = functional.normalize(found.float(), dim=-1)
        if input_ids is not None:
            found = self.backbone.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
            texts = functional.normalize(found.float(), dim=-1)
        return images, texts

    @property
    def dimension(self) -> int:
        """Size of the embeddings that both towers share."""
        config = self.backbone.config
        projection = getattr(config, "projection_dim", None)
        return int(projection if projection is not None else config.text_config.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def zeros_where_missing(embeddings: Tensor, present: Sequence[bool]) -> Tensor:
    """Expand the embeddings of the present inputs to all inputs.

    Args:
        embeddings: [n, D], one for each True of `present`, in order.
        present: of all inputs.

    Returns:
        [len(present), D]; zeros where an input is not present.
    """
    out = embeddings.new_zeros(len(present), embeddings.shape[1])
    index = torch.tensor([row for row, is_present in enumerate(present) if is_present], device=embeddings.device)
    return out.index_copy(0, index.long(), embeddings) if len(index) else out


def embed_towers(
    forward: Callable[..., tuple[Tensor, Tensor]],
    processor: DualProcessor,
    inputs: Sequence[DualInput],
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Image and text vectors of inputs, [B, D] each; zero where an input has no image or no text.

    Args:
        forward: a `DualEncoder`, or an engine around one.
        processor: of its checkpoint.
        inputs: B inputs.
        device: of the model.
    """
    images, texts = forward(**processor.collate(inputs, device))
    return (
        zeros_where_missing(images, [each.pixels is not None for each in inputs]),
        zeros_where_missing(texts, [each.input_ids is not None for each in inputs]),
    )


def fuse(images: Tensor, texts: Tensor) -> Tensor:
    """The vectors of items from those of their images and texts.

    Args:
        images: [B, D] of unit length, zero where an item has no image.
        texts: [B, D] of unit length, zero where it has no text.

    Returns:
        [B, D] of unit length; zero where both are.
    """
    return functional.normalize(images + texts, dim=-1)


def embed_dual_inputs(model: DualEncoder, processor: DualProcessor, inputs: Sequence[DualInput]) -> Tensor:
    """Vectors of items, [B, D] of unit length."""
    return fuse(*embed_towers(model, processor, inputs, model.device))


def dual_text(title: str, attributes: str) -> str:
    """The text that the text tower reads of an item; attributes come last, since a long text is cut at its end."""
    return "\n".join(part for part in (title, attributes) if part)
