"""Tiny checkpoints of a run: tokenizer from the catalogue's texts, captioning on a disjoint synthetic catalogue."""

from __future__ import annotations

import io
import json
import tempfile

import numpy as np
import torch
from PIL import Image

from afmrl_ray import storage
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.catalogue import CatalogueRef, make_catalogue
from afmrl_ray.config import Config
from afmrl_ray.config.catalogue import SyntheticConfig
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.pretrain import caption, pretrain
from afmrl_ray.models.tiny import build_encoder, build_generator, save_checkpoint, train_tokenizer
from afmrl_ray.models.tiny_dual_encoder import build_dual_encoder, save_dual_encoder, train_dual_tokenizer

# Far from any seed a user would pick; the few products that recur by chance are left out.
_DISJOINT_SEED = 900_001
TRUE_ATTRIBUTES = "true_attributes"


def make_tiny(config: Config, role: str, catalogue: CatalogueRef, directory: str) -> dict[str, float]:
    """Build, pre-train and save the tiny checkpoint of `role`; returns the first and last captioning loss.

    A dual encoder cannot write captions: it begins with random weights, and nothing is returned.
    """
    tiny = config.tiny
    torch.set_num_threads(1)
    examples = pretraining_examples(config, catalogue)
    texts = _texts(catalogue) + [text for _, title, text in examples for text in (title, text)]
    if role == "encoder" and config.encoder.kind == "dual_encoder":
        dual_tokenizer = train_dual_tokenizer(texts, tiny.vocabulary)
        tower = build_dual_encoder(tiny, config.encoder.image, dual_tokenizer, config.run.seed)
        with tempfile.TemporaryDirectory() as local:
            save_dual_encoder(tower, dual_tokenizer, local)
            storage.copy_dir(local, directory)
        return {}
    instructions = [config.encoder.instruction, config.generator.instruction, "user assistant"]
    tokenizer = train_tokenizer(texts + instructions * 50, tiny.vocabulary)
    model = (build_encoder if role == "encoder" else build_generator)(tiny, tokenizer, config.run.seed)
    with tempfile.TemporaryDirectory() as local:
        save_checkpoint(model, tokenizer, tiny, local)
        section = config.encoder if role == "encoder" else config.generator
        processor = ItemProcessor.from_pretrained(local, section.image)
        steps = tiny.encoder_pretrain_steps if role == "encoder" else tiny.generator_pretrain_steps

        def example(index: int) -> tuple[ModelInput, str]:
            image, title, text = examples[index]
            parts = (section.instruction, title) if role == "encoder" else (title, section.instruction)
            return processor.model_input(Image.open(io.BytesIO(image)).convert("RGB"), "\n".join(parts)), text

        losses = pretrain(
            model,
            processor,
            example,
            len(examples),
            steps=steps,
            batch_size=tiny.pretrain_batch_size,
            learning_rate=tiny.pretrain_learning_rate,
            seed=config.run.seed,
            label=f"captioning {role}",
        )
        model.save_pretrained(local)
        storage.copy_dir(local, directory)
    tail = losses[-20:] or [float("nan")]
    return {"first_loss": losses[0] if losses else float("nan"), "last_loss": float(np.mean(tail))}


def pretraining_examples(config: Config, catalogue_ref: CatalogueRef) -> list[tuple[bytes, str, str]]:
    """Image, title and caption of the items of a synthetic catalogue, but for products of the run's own."""
    catalogue = catalogue_ref.open()
    taken: set[tuple[str, str]] = set()
    if TRUE_ATTRIBUTES in catalogue.table.column_names:
        taken = set(zip(catalogue.column("category"), catalogue.column(TRUE_ATTRIBUTES), strict=True))
    products = max(config.tiny.pretrain_products, 1)
    synthetic = SyntheticConfig(
        preset=config.synthetic.preset,
        seed=_DISJOINT_SEED + config.synthetic.seed,
        train_products=products,
        val_products=1,
        test_products=1,
        items_per_product=2,
        duplicate_fraction=0.0,
        image_px=config.synthetic.image_px,
    )
    table = make_catalogue(synthetic)
    return [
        (row["image"], row["title"] or "", caption(row["category"], json.loads(row[TRUE_ATTRIBUTES]).items()))
        for row in table.to_pylist()
        if (row["category"], row[TRUE_ATTRIBUTES]) not in taken
    ]


def _texts(catalogue_ref: CatalogueRef) -> list[str]:
    """Everything that the run's models may read or write, for the tokenizer."""
    catalogue = catalogue_ref.open()
    items = [catalogue.item(row) for row in range(len(catalogue))]
    titles = [item.title for item in items if item.title]
    return titles + [format_attributes(normalise_attributes(item.attributes)) for item in items if item.attributes]
