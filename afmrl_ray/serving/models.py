"""The encoder and the generator of the rounds that are served: plain code, which the deployments call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from afmrl_ray.catalogue.images import image_size
from afmrl_ray.config.catalogue import Inputs
from afmrl_ray.models.adapters import load_trained
from afmrl_ray.models.annotate import write_attributes
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.microbatches import cut_by_tokens
from afmrl_ray.models.model_input import ModelInput, collate
from afmrl_ray.models.prompts import encoder_input
from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.uploads import Upload, Uploads

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class EncoderInput:
    """An item and the attribute text that the encoder sees with it."""

    upload: Upload
    attributes: str = ""


@dataclass(frozen=True)
class Embedding:
    """A vector [D] float32 of unit length, and the number of tokens of its input."""

    vector: np.ndarray
    tokens: int


class RoundModels(Generic[Loaded]):
    """A cache of loaded models by bundle; the least recently used is dropped.

    Args:
        load: loads the model of a bundle.
        kept: most models at a time.
    """

    def __init__(self, load: Callable[[Bundle], Loaded], kept: int) -> None:
        self._load, self._kept = load, kept
        self._held: OrderedDict[str, Loaded] = OrderedDict()
        self._lock, self._loading = Lock(), Lock()

    def get(self, bundle: Bundle) -> Loaded:
        """The model of a bundle, loaded if it is not cached; cached ones can be used meanwhile."""
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
    """Which inputs an item has."""
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
        rounds_kept: number of models that stay loaded.
        tokens: most tokens of a forward pass, visual ones and padding counted.
    """

    def __init__(self, *, rounds_kept: int, tokens: int) -> None:
        self._rounds = RoundModels(self._load, rounds_kept)
        self._tokens = tokens

    @staticmethod
    def _load(bundle: Bundle) -> _Encoder:
        model = load_trained(bundle.encoder_path, "encoder", dtype=bundle.encoder.dtype, device=_device())
        processor = ItemProcessor.from_pretrained(bundle.encoder_path, bundle.encoder.image)
        return _Encoder(EmbeddingModel(model).eval(), processor)

    def load(self, bundle: Bundle) -> None:
        """Load the model of a bundle."""
        self._rounds.get(bundle)

    def prepare(self, bundle: Bundle, item: EncoderInput) -> ModelInput:
        """Decode the image and tokenise the text, as in the encoder's training."""
        return encoder_input(
            self._rounds.get(bundle).processor,
            Uploads([item.upload]),
            0,
            config=bundle.encoder.config(),
            inputs=inputs_of(item.upload),
            attributes=item.attributes,
        )

    @torch.no_grad()
    def embed(self, bundle: Bundle, rows: Sequence[ModelInput]) -> np.ndarray:
        """[B, D] float32, of unit length."""
        encoder = self._rounds.get(bundle)
        found: dict[int, np.ndarray] = {}
        for part in cut_by_tokens([len(row) for row in rows], self._tokens):
            batch = collate([rows[position] for position in part], encoder.processor.pad_id, encoder.model.device)
            found.update(zip(part, encoder.model(**batch).cpu().numpy(), strict=True))
        return np.stack([found[position] for position in range(len(rows))])


@dataclass(frozen=True)
class _Generator:
    model: Any
    processor: ItemProcessor


class ServedGenerator:
    """Generators of the rounds that are served; attributes are decoded greedily.

    Args:
        rounds_kept: number of models that stay loaded.
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
        """Load the model of a bundle."""
        self._rounds.get(bundle)

    def tokens(self, bundle: Bundle, upload: Upload) -> int:
        """Most tokens that an item can take: its prompt and the longest completion."""
        size = None
        if upload.image is not None and bundle.generator.inputs != "text":
            size = image_size(upload.image)
        prompt = self._rounds.get(bundle).processor.length(size, f"{upload.title}\n{bundle.generator.instruction}")
        return prompt + bundle.generator.max_new_tokens

    def write(self, bundle: Bundle, uploads: Sequence[Upload]) -> list[tuple[str, str]]:
        """Attribute text and reason of invalidity of each item; one of the two is empty.

        An item without the inputs that the generator was trained on gets the reason `no_image`.
        """
        generator = self._rounds.get(bundle)
        found: list[tuple[str, str]] = [("", "no_image")] * len(uploads)
        wanted = bundle.generator.inputs
        for inputs in ("image", "text", "both"):
            positions = [n for n, upload in enumerate(uploads) if _usable_inputs(upload, wanted) == inputs]
            if positions:
                written = write_attributes(
                    generator.model,
                    generator.processor,
                    Uploads([uploads[position] for position in positions]),
                    range(len(positions)),
                    config=bundle.generator.config().model_copy(update={"inputs": inputs}),
                    max_pairs=self._max_pairs,
                )
                for position, result in zip(positions, written, strict=True):
                    found[position] = result
        return found


def _usable_inputs(upload: Upload, wanted: Inputs) -> Inputs | None:
    """Inputs of an item that a generator trained on `wanted` can use; None = it has none of them."""
    if wanted != "both":
        available = upload.image is not None if wanted == "image" else bool(upload.title)
        return wanted if available else None
    return inputs_of(upload) if upload.image is not None or upload.title else None
