"""The two models of the rounds that are served: plain code that replicas and tests call alike."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image

from afmrl_ray.config.catalogue import Inputs
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.adapters import load_trained
from afmrl_ray.models.annotate import write_attributes
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.microbatches import cut_by_tokens
from afmrl_ray.models.model_input import ModelInput, collate
from afmrl_ray.models.prompts import encoder_input
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.uploads import FORMATS, Upload, Uploads

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class EncoderInput:
    """An item for the encoder, with the attribute text that it is shown with."""

    upload: Upload
    attributes: str = ""


@dataclass(frozen=True)
class Embedding:
    """A vector [D] float32 of unit length, and the tokens it cost."""

    vector: np.ndarray
    tokens: int


class RoundModels(Generic[Loaded]):
    """Models by bundle, the least recently asked for dropped.

    Args:
        load: of a bundle.
        kept: most at a time.
    """

    def __init__(self, load: Callable[[Bundle], Loaded], kept: int) -> None:
        self._load, self._kept = load, kept
        self._held: OrderedDict[str, Loaded] = OrderedDict()
        self._lock, self._loading = Lock(), Lock()

    def get(self, bundle: Bundle) -> Loaded:
        """What belongs to a bundle, loaded if it is not there; others are at hand meanwhile."""
        found = self._find(bundle)
        if found is not None:
            return found
        with self._loading:
            found = self._find(bundle)
            if found is None:
                found = self._load(bundle)
                with self._lock:
                    self._held[bundle.key] = found
                    while len(self._held) > self._kept:
                        self._held.popitem(last=False)
        return found

    def _find(self, bundle: Bundle) -> Loaded | None:
        with self._lock:
            if bundle.key in self._held:
                self._held.move_to_end(bundle.key)
            return self._held.get(bundle.key)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def inputs_of(upload: Upload) -> Inputs:
    """What there is of an item."""
    if upload.image is None:
        return "text"
    return "both" if upload.title else "image"


@dataclass(frozen=True)
class _Encoder:
    model: EmbeddingModel
    processor: ItemProcessor


class ServedEncoder:
    """Encoders of the rounds that are served.

    Args:
        rounds_kept: that stay loaded.
        tokens: most of a forward pass, visual ones and padding counted.
    """

    def __init__(self, *, rounds_kept: int, tokens: int) -> None:
        self._rounds = RoundModels(self._load, rounds_kept)
        self._tokens = tokens

    @staticmethod
    def _load(bundle: Bundle) -> _Encoder:
        if bundle.encoder.kind != "qwen2_vl":
            raise ConfigError(f"encoder.kind {bundle.encoder.kind} is for comparison only and is not served")
        model = load_trained(bundle.encoder_path, "encoder", dtype=bundle.encoder.dtype, device=_device())
        processor = ItemProcessor.from_pretrained(bundle.encoder_path, bundle.encoder.image)
        return _Encoder(EmbeddingModel(model).eval(), processor)

    def load(self, bundle: Bundle) -> None:
        """Have a bundle's model at hand."""
        self._rounds.get(bundle)

    def prepare(self, bundle: Bundle, given: EncoderInput) -> ModelInput:
        """Decode the image and tokenise."""
        return encoder_input(
            self._rounds.get(bundle).processor,
            Uploads([given.upload]),
            0,
            config=bundle.encoder,
            inputs=inputs_of(given.upload),
            attributes=given.attributes,
        )

    @torch.no_grad()
    def embed(self, bundle: Bundle, rows: Sequence[ModelInput]) -> np.ndarray:
        """[B, D] float32, of unit length."""
        encoder = self._rounds.get(bundle)
        found: dict[int, np.ndarray] = {}
        for part in cut_by_tokens([len(row) for row in rows], self._tokens):
            batch = collate([rows[place] for place in part], encoder.processor.pad_id, encoder.model.device)
            found.update(zip(part, encoder.model(**batch).cpu().numpy(), strict=True))
        return np.stack([found[place] for place in range(len(rows))])


@dataclass(frozen=True)
class _Generator:
    model: Any
    processor: ItemProcessor


class ServedGenerator:
    """Generators of the rounds that are served; attributes are decoded greedily.

    Args:
        rounds_kept: that stay loaded.
        max_pairs: see `models.annotate.write_attributes`.
    """

    def __init__(self, *, rounds_kept: int, max_pairs: int | None) -> None:
        self._rounds = RoundModels(self._load, rounds_kept)
        self._max_pairs = max_pairs

    @staticmethod
    def _load(bundle: Bundle) -> _Generator:
        model = load_trained(bundle.generator_path, "generator", dtype=bundle.generator.dtype, device=_device())
        return _Generator(model.eval(), ItemProcessor.from_pretrained(bundle.generator_path, bundle.generator.image))

    def load(self, bundle: Bundle) -> None:
        """Have a bundle's model at hand."""
        self._rounds.get(bundle)

    def tokens(self, bundle: Bundle, upload: Upload) -> int:
        """What an item costs at most: its prompt and the longest answer."""
        size = None
        if upload.image is not None and bundle.generator.inputs != "text":
            with Image.open(io.BytesIO(upload.image), formats=FORMATS) as image:
                size = image.size
        prompt = self._rounds.get(bundle).processor.length(size, f"{upload.title}\n{bundle.generator.instruction}")
        return prompt + bundle.generator.max_new_tokens

    def write(self, bundle: Bundle, uploads: Sequence[Upload]) -> list[tuple[str, str]]:
        """Attribute text and reason of invalidity of each item; one of the two is empty.

        A generator that was trained on images cannot say anything without one: reason `no_image`.
        """
        generator = self._rounds.get(bundle)
        found: list[tuple[str, str]] = [("", "no_image")] * len(uploads)
        wanted = bundle.generator.inputs
        for inputs in ("image", "text", "both"):
            places = [place for place, upload in enumerate(uploads) if _shown(upload, wanted) == inputs]
            if places:
                items = Uploads([uploads[place] for place in places])
                config = bundle.generator.model_copy(update={"inputs": inputs})
                written = write_attributes(
                    generator.model,
                    generator.processor,
                    items,
                    range(len(places)),
                    config=config,
                    max_pairs=self._max_pairs,
                )
                for place, one in zip(places, written, strict=True):
                    found[place] = one
        return found


def _shown(upload: Upload, wanted: Inputs) -> Inputs | None:
    """What the generator is shown of an item, given what it was trained on; none = nothing that it knows."""
    if wanted != "both":
        there = upload.image is not None if wanted == "image" else bool(upload.title)
        return wanted if there else None
    return inputs_of(upload) if upload.image is not None or upload.title else None
