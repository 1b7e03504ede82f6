"""Export of a trained encoder as a folder that stock sentence-transformers loads, with the same embeddings.

Only files are written; sentence-transformers need not be installed. They express what this project's code does around
the model:

- the chat template puts the image first, then instruction, title and attributes, a line each, as
  `models.prompts.encoder_input` does; the instruction is the prompt that sentence-transformers adds by default;
- the tokenizer's post-processor adds the end of the turn, whose last token is pooled, after a text has been cut;
- the image processor has the pixel budget of the run.

With weights in bfloat16 the embeddings are equal within its precision, in which sentence-transformers normalises them.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from afmrl_ray.errors import ConfigError
from afmrl_ray.models.adapters import load_trained
from afmrl_ray.models.backbones import fetch
from afmrl_ray.models.export import new_folder
from afmrl_ray.models.item_processor import chat_frame, load_processors
from afmrl_ray.models.model_settings import EncoderSettings
from afmrl_ray.models.unwrap import unwrap_model

# The processor of Qwen2-VL itself cannot be loaded without torchvision, which its videos need, and with torchvision it
# resizes images to other pixels. This one reads the same tokens, has no videos and asks for neither.
PROCESSOR = "PaddleOCRVLProcessor"
MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)
CHAT_TEMPLATE = (
    "{%- set item = namespace(images=0, lines=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- set item.lines = item.lines + [message['content']] -%}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set item.images = item.images + 1 -%}"
    "{%- elif part['type'] == 'text' -%}{%- set item.lines = item.lines + [part['text']] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- PREFIX -}}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' * item.images -}}"
    "{{- item.lines | select | join('\\n') -}}"
    "{%- if add_generation_prompt -%}{{- SUFFIX -}}{%- endif -%}"
)
CARD = Path(__file__).with_name("sentence_transformers_card.md")


def export_sentence_transformers(path: str, out: str, settings: EncoderSettings) -> None:
    """Write an encoder, its adapter merged, as a folder for `SentenceTransformer(out)`.

    Args:
        path: folder or URI of a model or adapter, or a hub name of a model.
        out: folder or URI, empty or new.
        settings: of the encoder; pixel budget, instruction, longest input and dtype go into the folder.

    Raises:
        CheckpointError: see `models.adapters.load_trained`; no tokenizer or image processor; `out` is not empty.
        ConfigError: the instruction begins with a line break, which would melt into the chat template's own.
    """
    with new_folder(out) as local:
        _save_processors(fetch(path), Path(local), settings)
        model = load_trained(path, "encoder", dtype=settings.dtype)
        model.save_pretrained(local, safe_serialization=True)
        _save_modules(Path(local), int(unwrap_model(model).config.text_config.hidden_size), settings)
        (Path(local) / "README.md").write_text(_card(settings))
        settings.write(local)


def _save_processors(path: str, folder: Path, settings: EncoderSettings) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer, image_processor = load_processors(
        path, model_max_length=settings.max_tokens, image_token="<|image_pad|>"
    )
    before, after = chat_frame(tokenizer)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if encode(before + settings.instruction) != encode(before) + encode(settings.instruction):
        raise ConfigError(
            "encoder.instruction: begins with a line break, which melts into the chat template's own; train without it"
        )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("PREFIX", _literal(before)).replace("SUFFIX", _literal(after))
    ids = encode(after)
    # sentence-transformers asks the chat template for no end of the turn, so that a text is cut before it gets one.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A turn_end",
        special_tokens=[{"id": "turn_end", "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}],
    )
    tokenizer.save_pretrained(folder)
    image_processor.size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    image_processor.save_pretrained(folder)
    _write(folder / "processor_config.json", {"processor_class": PROCESSOR})


def _save_modules(folder: Path, dimension: int, settings: EncoderSettings) -> None:
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modules = [{"idx": n, "name": str(n), "path": where, "type": what} for n, (where, what) in enumerate(MODULES)]
    _write(folder / "modules.json", modules)
    _write(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": forward, "image": forward, "message": {**forward, "format": "structured"}},
            "module_output_name": "token_embeddings",
            "processor_kwargs": {"backend": "pil"},
            "unpad_inputs": False,
        },
    )
    _write(folder / "1_Pooling/config.json", {"embedding_dimension": dimension, "pooling_mode": "lasttoken"})
    _write(folder / "2_Normalize/config.json", {})
    _write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": dict.fromkeys(("query", "document"), settings.instruction),
            "default_prompt_name": "document",
            "similarity_fn_name": "cosine",
        },
    )


def _card(settings: EncoderSettings) -> str:
    values = {
        "INSTRUCTION": f"The instruction {_literal(settings.instruction)}"
        if settings.instruction
        else "No instruction",
        "MIN_PIXELS": str(settings.min_pixels),
        "MAX_PIXELS": str(settings.max_pixels),
        "MAX_TOKENS": str(settings.max_tokens),
        "TRANSFORMERS": metadata.version("transformers"),
    }
    text = CARD.read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _literal(text: str) -> str:
    """A string literal that is valid in both Jinja and JSON."""
    return json.dumps(text, ensure_ascii=False)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
