"""Tiny CLIP checkpoints with random weights, saved in the ordinary Hugging Face layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from afmrl_ray.config.models import ImageConfig, TinyConfig

BEGIN, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
_MAX_TOKENS = 77


def train_dual_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer with `vocabulary` entries that adds begin and end tokens to every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, model_max_length=_MAX_TOKENS
    )


def build_dual_encoder(config: TinyConfig, image: ImageConfig, tokenizer: Any, seed: int) -> Any:
    """A CLIP model with random weights.

    Args:
        config: sizes; the text tower has that of the language model, the image tower that of the vision tower.
        image: pixel budget, see `side_px`.
        tokenizer: of the text tower.
        seed: of the weights.
    """
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": 3 * config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": _MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": 2 * config.vision_width,
        "num_hidden_layers": config.vision_depth,
        "num_attention_heads": 4,
        "patch_size": config.patch_px,
        "image_size": side_px(config, image),
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.hidden_size))


def side_px(config: TinyConfig, image: ImageConfig) -> int:
    """Side in pixels of the largest square of whole patches within `image.max_pixels`."""
    return max(1, math.isqrt(image.max_pixels) // config.patch_px) * config.patch_px


def save_dual_encoder(model: Any, tokenizer: Any, path: str) -> None:
    """Save model, tokenizer and image processor as an ordinary Hugging Face folder."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    Path(path).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    side = model.config.vision_config.image_size
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(path)
