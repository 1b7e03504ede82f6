"""Dual encoders (CLIP, SigLIP): images and texts through towers of their own, and an item as what both say.

The checkpoint is an ordinary Hugging Face folder or hub name; image size, text length and padding are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from afmrl_ray.models.inner import inner_model
from afmrl_ray.models.item_processor import load_processors


@dataclass(frozen=True)
class DualRow:
    """One item, or anything else that has an image, a text or both.

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
        longest: tokens of the text tower.
        pad_to_longest: pad every text to `longest`, which SigLIP was trained with.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, *, longest: int, pad_to_longest: bool) -> None:
        self._tokenizer, self._image_processor = tokenizer, image_processor
        self._longest, self._pad_to_longest = longest, pad_to_longest

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
            longest=int(config.text_config.max_position_embeddings),
            pad_to_longest=config.model_type == "siglip",
        )

    def pixels(self, image: Image.Image) -> np.ndarray:
        """[3, height, width] float32 of one image."""
        return self._image_processor(images=[image], return_tensors="np")["pixel_values"][0].astype(np.float32)

    def tokens(self, text: str) -> np.ndarray:
        """[L] token ids with the tokenizer's special ones, cut to the text tower's length."""
        ids = self._tokenizer(text, truncation=True, max_length=self._longest)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    def row(self, image: Image.Image | None, text: str) -> DualRow:
        """An item's row; an empty text is none."""
        return DualRow(self.pixels(image) if image is not None else None, self.tokens(text) if text.strip() else None)

    def collate(self, rows: Sequence[DualRow], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Keyword arguments of `DualEncoder.forward`: images and texts of those rows that have one, in order."""
        found: dict[str, Tensor] = {}
        pixels = [row.pixels for row in rows if row.pixels is not None]
        if pixels:
            found["pixel_values"] = torch.from_numpy(np.stack(pixels)).to(device)
        texts = [row.input_ids for row in rows if row.input_ids is not None]
        if texts:
            length = self._longest if self._pad_to_longest else max(len(ids) for ids in texts)
            ids = np.full((len(texts), length), self._tokenizer.pad_token_id, dtype=np.int64)
            mask = np.zeros_like(ids)
            for place, text in enumerate(texts):
                ids[place, : len(text)], mask[place, : len(text)] = text, 1
            found["input_ids"] = torch.from_numpy(ids).to(device)
            if not self._pad_to_longest:
                found["attention_mask"] = torch.from_numpy(mask).to(device)
        return found


class DualEncoder(nn.Module):
    """Wraps a `CLIPModel` or `SiglipModel` so that its forward pass gives unit vectors of images and of texts.

    The checkpoint's logit scale (and bias) is left as it is: similarities are divided by `agcl.temperature`.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        inner = inner_model(backbone)
        for name in ("logit_scale", "logit_bias"):
            # DeepSpeed cannot hold parameters without dimensions; a buffer is saved under the same name.
            if name in inner._parameters:
                inner.register_buffer(name, inner._parameters.pop(name).detach())

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


def placed(embeddings: Tensor, there: Sequence[bool]) -> Tensor:
    """Rows [n, D] put where `there` is true, zeros elsewhere: [len(there), D]."""
    out = embeddings.new_zeros(len(there), embeddings.shape[1])
    places = torch.tensor([place for place, is_there in enumerate(there) if is_there], device=embeddings.device)
    return out.index_copy(0, places.long(), embeddings) if len(places) else out


def fuse(images: Tensor, texts: Tensor) -> Tensor:
    """An item's vector from its image's and its text's, either of which may be zero.

    Args:
        images: [B, D] of unit length, zero where an item has no image.
        texts: [B, D] of unit length, zero where it has no text.

    Returns:
        [B, D] of unit length; zero where both are.
    """
    return functional.normalize(images + texts, dim=-1)


def embed_dual_rows(model: DualEncoder, processor: DualProcessor, rows: Sequence[DualRow]) -> Tensor:
    """Items' vectors [B, D]."""
    images, texts = model(**processor.collate(rows, model.device))
    return fuse(
        placed(images, [row.pixels is not None for row in rows]),
        placed(texts, [row.input_ids is not None for row in rows]),
    )


def dual_text(title: str, attributes: str) -> str:
    """What an item's text tower reads; attributes come last, where a long text is cut."""
    return "\n".join(part for part in (title, attributes) if part)
