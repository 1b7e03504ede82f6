"""From items to model inputs: token ids, patches and M-RoPE positions, with the checkpoint's own tokenizer.

Every prompt is `prefix | image | text | suffix`, where prefix and suffix come from the checkpoint's chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from afmrl_ray.attributes.text import SEPARATOR
from afmrl_ray.config.models import ImageConfig
from afmrl_ray.errors import CheckpointError
from afmrl_ray.models.backbones import fetch
from afmrl_ray.models.model_input import ModelInput, PixelFormat, Visual, mrope_positions
from afmrl_ray.models.unique_names import NameTokens

_SENTINEL = "\u2042"

ImageLike = Image.Image | Visual
"""An image before or after `ItemProcessor.visual`."""


def load_processors(path: str, **settings: Any) -> tuple[Any, Any]:
    """Tokenizer and image processor of a checkpoint folder or hub name.

    Args:
        path: folder, URI or hub name.
        settings: of the tokenizer, which override its own.

    Raises:
        CheckpointError: there is no tokenizer or no image processor, or it cannot be loaded.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(fetch(path), **settings)
        # The other backend needs torchvision and produces different pixels.
        return tokenizer, AutoImageProcessor.from_pretrained(fetch(path), backend="pil")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no tokenizer or image processor ({_one_line(error)})") from error


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """The text that the checkpoint's chat template puts before and after a user's message, up to the answer's start.

    Raises:
        CheckpointError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise CheckpointError("the tokenizer has no chat template; use an instruct checkpoint")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": _SENTINEL}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    before, _, after = text.partition(_SENTINEL)
    return before, after


class ItemProcessor:
    """Tokenizer and image processor of one checkpoint."""

    def __init__(self, tokenizer: Any, image_processor: Any, image: ImageConfig) -> None:
        self.tokenizer = tokenizer
        self._image_processor = image_processor
        self._size = {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}
        self._budget = {"min_pixels": image.min_pixels, "max_pixels": image.max_pixels}
        self.merge_size = int(image_processor.merge_size)
        self._pixels = PixelFormat.of(image_processor)
        self._image_id = self._special("<|image_pad|>")
        self._vision_start, self._vision_end = self._special("<|vision_start|>"), self._special("<|vision_end|>")
        self.end_id = self._special("<|im_end|>")
        self.pad_id = int(tokenizer.pad_token_id)
        self.forbidden_ids = sorted(
            i for token, i in tokenizer.get_added_vocab().items() if token != "<|im_end|>" and token.startswith("<|")
        )
        before, after = chat_frame(tokenizer)
        self._prefix, self._suffix = self._encode(before), self._encode(after)

    @classmethod
    def from_pretrained(cls, path: str, image: ImageConfig) -> ItemProcessor:
        """Load from a checkpoint folder or hub name.

        Raises:
            CheckpointError: see `load_processors`; or the tokenizer lacks tokens or a chat template.
        """
        tokenizer, image_processor = load_processors(path)
        return cls(tokenizer, image_processor, image)

    def _special(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or (index == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise CheckpointError(f"the tokenizer lacks {token}; use a Qwen2-VL or Qwen2.5-VL checkpoint")
        return int(index)

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    @cached_property
    def separator_ids(self) -> list[int]:
        """Token ids whose text contains the separator of attribute pairs."""
        added = set(self.tokenizer.get_added_vocab())
        vocabulary = self.tokenizer.get_vocab().items()
        return sorted(index for token, index in vocabulary if SEPARATOR in token and token not in added)

    @cached_property
    def name_tokens(self) -> NameTokens:
        """What the tokens do to attribute text, for `models.unique_names.UniqueNames`."""
        return NameTokens(self.tokenizer)

    def pixel_settings(self) -> dict[str, Any]:
        """All settings that the patches of an image depend on, as JSON values."""
        return {**self._image_processor.to_dict(), "size": self._size}

    def visual(self, image: Image.Image) -> Visual:
        """Patches of one image."""
        out = self._image_processor(
            images=[image], size=self._size, do_rescale=False, do_normalize=False, return_tensors="np"
        )
        grid = tuple(int(n) for n in out["image_grid_thw"][0])
        frames = out["pixel_values"].reshape(grid[1] * grid[2], len(self._pixels.scale), self._pixels.frames, -1)
        return Visual(grid, frames[:, :, 0].astype(np.uint8), self._pixels)  # type: ignore[arg-type]

    def model_input(
        self, image: ImageLike | Sequence[ImageLike] | None, text: str, *, max_tokens: int | None = None
    ) -> ModelInput:
        """Build the sequence of one item.

        Args:
            image: an image, or the `visual` of one, or several; none = text only.
            text: everything after the image.
            max_tokens: cut the end of `text` so that the sequence has at most this many tokens; images are never cut.
        """
        images = [] if image is None else [image] if isinstance(image, ImageLike) else list(image)
        visuals = tuple(self.visual(one) if isinstance(one, Image.Image) else one for one in images)
        tokens = np.array([token for visual in visuals for token in self._visual_tokens(visual)], dtype=np.int64)
        text_ids = self._encode(plain_text(text))
        if max_tokens is not None:
            limit = max_tokens - len(self._prefix) - len(tokens) - len(self._suffix)
            text_ids = text_ids[: max(limit, 0)]
        input_ids = np.concatenate([self._prefix, tokens, text_ids, self._suffix])
        token_types = (input_ids == self._image_id).astype(np.int64)
        positions = mrope_positions(token_types, [visual.grid for visual in visuals], self.merge_size)
        return ModelInput(input_ids, token_types, positions, visuals)

    def _visual_tokens(self, visual: Visual) -> list[int]:
        count = visual.grid[1] * visual.grid[2] // self.merge_size**2
        return [self._vision_start, *[self._image_id] * count, self._vision_end]

    def length(self, image_size: tuple[int, int] | None, text: str) -> int:
        """Tokens of the sequence that `model_input` would build, from the image's (width, height) alone."""
        visual = 0
        if image_size is not None:
            width, height = image_size
            patches = self._image_processor.get_number_of_image_patches(height, width, self._budget)
            visual = patches // self.merge_size**2 + 2
        return len(self._prefix) + visual + len(self._encode(plain_text(text))) + len(self._suffix)

    def completion_ids(self, text: str) -> np.ndarray:
        """[C] token ids of a completion and the end-of-turn token."""
        return np.append(self._encode(text), self.end_id)

    def decode(self, ids: Sequence[int]) -> tuple[str, bool]:
        """Text of a completion up to its end of turn, and whether it has one; other special tokens are decoded too."""
        ids = list(ids)
        complete = self.end_id in ids
        text_ids = ids[: ids.index(self.end_id)] if complete else ids
        return self.tokenizer.decode(text_ids, skip_special_tokens=False), complete


def plain_text(text: str) -> str:
    """A seller's text with the marks of special tokens broken up, which would end a turn or request an image."""
    return text.replace("<|", "< |")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
