"""Tiny models and catalogues of the benchmarks."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch

from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue, make_catalogue, open_catalogue, write_catalogue
from afmrl_ray.config import Config, validate
from afmrl_ray.config.catalogue import CatalogueConfig
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.tiny import build_encoder, build_generator, save_checkpoint, train_tokenizer

TINY = {"hidden_size": 128, "num_layers": 4, "patch_px": 7}
SMALL = {
    **{"hidden_size": 256, "num_layers": 6, "num_heads": 8},
    **{"vision_width": 128, "vision_depth": 4, "patch_px": 14},
}


@dataclass(frozen=True)
class Bench:
    """Config, catalogue and encoder of a benchmark."""

    config: Config
    reference: CatalogueRef
    checkpoint: str

    @property
    def catalogue(self) -> StagedCatalogue:
        return self.reference.open()

    def model(self) -> torch.nn.Module:
        """The encoder's backbone, with the same weights at every call."""
        return load_backbone(self.checkpoint, "encoder")

    def processor(self) -> ItemProcessor:
        return ItemProcessor.from_pretrained(self.checkpoint, self.config.encoder.image)


def make_bench(
    batch_size: int, train_products: int, *, image_px: int = 56, tiny: dict[str, int] = TINY, **agcl: object
) -> Bench:
    """A synthetic catalogue and a tiny random encoder in a temporary folder.

    Args:
        batch_size: pairs per batch.
        train_products: training products of the catalogue.
        image_px: width and height of the images; a visual token covers a square of side 2 * `patch_px`.
        tiny: shape of the encoder.
        agcl: further settings of `agcl`.
    """
    folder = Path(tempfile.mkdtemp(prefix="afmrl-bench-"))
    config = validate(
        {
            "synthetic": {"preset": "tiny", "train_products": train_products, "image_px": image_px},
            "tiny": tiny,
            "encoder": {"image": {"min_pixels": image_px**2, "max_pixels": image_px**2}},
            "agcl": {
                "batch_size": batch_size,
                "adapter": {"kind": "full", "train_vision": True},
                "lexical": {"enabled": False},
                "mask": {"enabled": False},
                "attribute_dropout": {"query": 1.0, "positive": 1.0},
                **agcl,
            },
        }
    )
    path = str(folder / "catalogue.parquet")
    write_catalogue(make_catalogue(config.synthetic), path)
    staged = CatalogueConfig(path=path, cache_dir=str(folder / "staging"))
    catalogue = open_catalogue(path, config=staged)
    texts = [title for title in catalogue.column("title") if title]
    texts += [format_attributes(normalise_attributes(catalogue.item(row).attributes)) for row in range(len(catalogue))]
    tokenizer = train_tokenizer([*texts, config.encoder.instruction], config.tiny.vocabulary)
    save_checkpoint(build_encoder(config.tiny, tokenizer, 0), tokenizer, config.tiny, str(folder / "encoder"))
    return Bench(config, CatalogueRef(path, staged, catalogue.fingerprint), str(folder / "encoder"))


@dataclass(frozen=True)
class GeneratorBench:
    """Config, catalogue and generator of a benchmark.

    Attributes:
        pixels: size argument of the image processor.
    """

    config: Config
    reference: CatalogueRef
    checkpoint: str
    pixels: dict[str, int]


def make_generator_bench(*, image: bool, words: int, new_tokens: int, train_products: int = 16) -> GeneratorBench:
    """A synthetic catalogue and a tiny random generator in a temporary folder.

    Args:
        image: whether prompts contain an image, of 196 visual tokens.
        words: words of the instruction, in addition to the item's title.
        new_tokens: tokens per completion.
        train_products: training products of the catalogue.
    """
    folder = Path(tempfile.mkdtemp(prefix="afmrl-bench-"))
    pixels = 28 * 28 * 196
    config = validate(
        {
            "synthetic": {"preset": "tiny", "train_products": train_products, "image_px": 392},
            "tiny": SMALL,
            "generator": {
                "inputs": "both" if image else "text",
                "instruction": " ".join(
                    islice(cycle(["name", "every", "attribute", "of", "it", "and", "its", "value"]), words)
                ),
                "max_new_tokens": new_tokens,
                "image": {"min_pixels": pixels, "max_pixels": pixels},
            },
        }
    )
    path = str(folder / "catalogue.parquet")
    write_catalogue(make_catalogue(config.synthetic), path)
    staged = CatalogueConfig(path=path, cache_dir=str(folder / "staging"))
    catalogue = open_catalogue(path, config=staged)
    texts = [title for title in catalogue.column("title") if title]
    tokenizer = train_tokenizer([*texts, config.generator.instruction], config.tiny.vocabulary)
    save_checkpoint(build_generator(config.tiny, tokenizer, 0), tokenizer, config.tiny, str(folder / "generator"))
    return GeneratorBench(
        config,
        CatalogueRef(path, staged, catalogue.fingerprint),
        str(folder / "generator"),
        {"shortest_edge": pixels, "longest_edge": pixels},
    )
