"""Tiny Qwen2-VL and Qwen2.5-VL checkpoints with a tokenizer of their own, saved in the ordinary Hugging Face layout.

They are loaded by path, as published checkpoints are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from afmrl_ray.config.models import TinyConfig

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Train a Qwen2 tokenizer (byte-level BPE) with `vocabulary` entries, special tokens included.

    Any text can be encoded: every byte has an entry, whether the texts contain it or not.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    template = Qwen2TokenizerFast()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blank = template.backend_tokenizer
    blank.train_from_iterator(texts, trainer)
    import json

    model = json.loads(blank.to_str())["model"]
    vocab = {token: index for token, index in model["vocab"].items() if token not in SPECIAL_TOKENS}
    ordered = {token: index for index, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    return Qwen2TokenizerFast(
        vocab=ordered,
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
    )


def build_encoder(config: TinyConfig, tokenizer: Any, seed: int) -> Any:
    """A Qwen2-VL model with random weights."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    vision = {
        "depth": config.vision_depth,
        "embed_dim": config.vision_width,
        "hidden_size": config.hidden_size,
        "num_heads": 4,
        "patch_size": config.patch_px,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "mlp_ratio": 2,
    }
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=_text_config(config, tokenizer), vision_config=vision, **_token_ids(tokenizer), **_tied()
        )
    )


def build_generator(config: TinyConfig, tokenizer: Any, seed: int) -> Any:
    """A Qwen2.5-VL model with random weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    vision = {
        "depth": config.vision_depth,
        "hidden_size": config.vision_width,
        "out_hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.vision_width,
        "num_heads": 4,
        "patch_size": config.patch_px,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "window_size": 16 * config.patch_px,
        "fullatt_block_indexes": [config.vision_depth - 1],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=_text_config(config, tokenizer), vision_config=vision, **_token_ids(tokenizer), **_tied()
        )
    )


def save_checkpoint(model: Any, tokenizer: Any, config: TinyConfig, path: str) -> None:
    """Save model, tokenizer and image processor as an ordinary Hugging Face folder."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Path(path).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessorPil(patch_size=config.patch_px, temporal_patch_size=1, merge_size=2).save_pretrained(path)


def _text_config(config: TinyConfig, tokenizer: Any) -> dict[str, Any]:
    head_dim = config.hidden_size // config.num_heads
    height = width = head_dim * 3 // 16
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": 3 * config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": max(1, config.num_heads // 2),
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_dim // 2 - height - width, height, width],
        },
        **_tied(),
    }


def _token_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in names.items()}


def _tied() -> dict[str, bool]:
    return {"tie_word_embeddings": True}
