"""Encoders over a catalogue, and embeddings of many items by a pool of Ray Data actors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from afmrl_ray import storage
from afmrl_ray.attributes.store import read_attributes
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config.catalogue import Inputs
from afmrl_ray.config.cluster import PoolConfig
from afmrl_ray.config.models import EncoderConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.actor_pool import map_rows
from afmrl_ray.models.adapters import load_trained
from afmrl_ray.models.backbones import fetch
from afmrl_ray.models.dual_encoder import DualEncoder, DualInput, DualProcessor, dual_text, embed_dual_inputs
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.microbatches import cut_by_tokens
from afmrl_ray.models.model_input import ModelInput, collate
from afmrl_ray.models.prefix_groups import embed_groups
from afmrl_ray.models.prompts import encoder_inputs
from afmrl_ray.models.shared_prefix import use_shared_prefix
from afmrl_ray.models.vision_cache import VisionCache


@dataclass(frozen=True)
class EncoderRef:
    """A trained encoder as plain data that actors load.

    Attributes:
        path: model or adapter folder, or hub name.
        config: kind of the encoder, and how items are presented to it.
    """

    path: str
    config: EncoderConfig


class ItemEncoder(ABC):
    """A frozen encoder that embeds rows of a catalogue, each together with an attribute text.

    The interface of every encoder kind. Plain code, called by actors and tests alike.
    """

    def __init__(self, catalogue: CatalogueRef) -> None:
        self._catalogue = catalogue.open()
        self._items = self._catalogue.column("item_id")

    @property
    def items(self) -> list[str]:
        """Item id of every catalogue row."""
        return self._items

    @torch.no_grad()
    def embed(
        self, rows: list[int], texts: list[str], *, inputs: Inputs, title_columns: tuple[str, ...] = ("title",)
    ) -> np.ndarray:
        """Embed catalogue rows, each with an attribute text.

        Args:
            rows: [B] catalogue rows.
            texts: [B] attribute texts; an empty text means without attributes.
            inputs: image, text or both.
            title_columns: columns that make up the title.

        Returns:
            [B, D] float32, of unit length.
        """
        built = [self._model_input(row, text, inputs, title_columns) for row, text in zip(rows, texts, strict=True)]
        return self._forward(built).cpu().numpy()

    @abstractmethod
    def _model_input(self, row: int, text: str, inputs: Inputs, title_columns: tuple[str, ...]) -> Any:
        """Model input of one catalogue row with one attribute text."""

    @abstractmethod
    def _forward(self, built: Sequence[Any]) -> torch.Tensor:
        """[B, D] embeddings of model inputs."""


class Encoder(ItemEncoder):
    """Qwen2-VL; also computes the common prefix of an item's inputs once.

    Raises:
        ConfigError: `encoder` is of another kind.
    """

    def __init__(self, encoder: EncoderRef, catalogue: CatalogueRef) -> None:
        if encoder.config.kind != "qwen2_vl":
            raise ConfigError(
                f"encoder.kind {encoder.config.kind} has no prefixes to share between attribute texts, so RAR cannot "
                "search with it; set encoder.kind=qwen2_vl"
            )
        super().__init__(catalogue)
        model = load_trained(encoder.path, "encoder", dtype=encoder.config.dtype, device=_device())
        self._processor = ItemProcessor.from_pretrained(encoder.path, encoder.config.image)
        self._model = EmbeddingModel(model).eval()
        self._config = encoder.config
        cached = encoder.config.vision_cache
        self._cache = VisionCache(model.requires_grad_(False), self._processor, cached) if cached.enabled else None

    def share_prefixes(self) -> None:
        """Prepare the model for `embed_groups`.

        Raises:
            ValueError: see `models.shared_prefix.use_shared_prefix`.
        """
        use_shared_prefix(self._model.backbone)

    def item_rows(
        self, row: int, texts: Sequence[str], *, inputs: Inputs, title_columns: tuple[str, ...] = ("title",)
    ) -> list[ModelInput]:
        """Model inputs of one catalogue row, one for each attribute text."""
        return encoder_inputs(
            self._processor,
            self._catalogue,
            row,
            config=self._config,
            inputs=inputs,
            title_columns=title_columns,
            attributes=texts,
            cache=self._cache,
        )

    @torch.no_grad()
    def embed_groups(self, groups: Sequence[Sequence[ModelInput]], *, tokens: int) -> np.ndarray:
        """Embed groups of `item_rows`; the common prefix of a group is computed once.

        Args:
            groups: model inputs of one item each.
            tokens: most tokens of one forward pass, visual ones included.

        Returns:
            [K, D] float32, of unit length, group after group.
        """
        return embed_groups(self._model, groups, self._processor.pad_id, tokens=tokens).cpu().numpy()

    @torch.no_grad()
    def embed_each(self, rows: Sequence[ModelInput], *, tokens: int) -> np.ndarray:
        """Embed `item_rows` without sharing prefixes; arguments and result as in `embed_groups`."""
        found: dict[int, np.ndarray] = {}
        for part in cut_by_tokens([len(row) for row in rows], tokens):
            found.update(zip(part, self._forward([rows[place] for place in part]).cpu().numpy(), strict=True))
        return np.stack([found[place] for place in range(len(rows))])

    def _model_input(self, row: int, text: str, inputs: Inputs, title_columns: tuple[str, ...]) -> ModelInput:
        return self.item_rows(row, [text], inputs=inputs, title_columns=title_columns)[0]

    def _forward(self, built: Sequence[ModelInput]) -> torch.Tensor:
        return self._model(**collate(list(built), self._processor.pad_id, self._model.device))


class DualEncoderEmbedder(ItemEncoder):
    """A dual encoder (CLIP, SigLIP)."""

    def __init__(self, encoder: EncoderRef, catalogue: CatalogueRef) -> None:
        super().__init__(catalogue)
        model = load_trained(encoder.path, "dual_encoder", dtype=encoder.config.dtype, device=_device())
        self._model = DualEncoder(model).eval()
        self._processor = DualProcessor.from_pretrained(fetch(encoder.path), model)

    def _model_input(self, row: int, text: str, inputs: Inputs, title_columns: tuple[str, ...]) -> DualInput:
        title = self._catalogue.title(row, title_columns) if inputs != "image" else ""
        image = self._catalogue.image(row) if inputs != "text" else None
        return self._processor.model_input(image, dual_text(title, text))

    def _forward(self, built: Sequence[DualInput]) -> torch.Tensor:
        return embed_dual_inputs(self._model, self._processor, built)


def open_encoder(encoder: EncoderRef, catalogue: CatalogueRef) -> ItemEncoder:
    """Load the encoder of `encoder.config.kind`."""
    kinds = {"qwen2_vl": Encoder, "dual_encoder": DualEncoderEmbedder}
    return kinds[encoder.config.kind](encoder, catalogue)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class View:
    """How items are presented to the encoder.

    Attributes:
        inputs: image, text or both.
        title_columns: columns that make up the title.
        with_attributes: whether the stored attributes are part of the input.
    """

    inputs: Inputs
    title_columns: tuple[str, ...]
    with_attributes: bool


class EmbedActor:
    """Ray Data actor around an encoder; column `view` of a batch is the index of each row's view."""

    def __init__(
        self,
        encoder: EncoderRef,
        catalogue: CatalogueRef,
        attributes: str | None,
        views: tuple[View, ...],
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self._encoder = open_encoder(encoder, catalogue)
        self._store = read_attributes(attributes) if attributes is not None else None
        self._views = views

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        embedded: dict[int, np.ndarray] = {}
        for index in np.unique(batch["view"]).tolist():
            places = np.flatnonzero(batch["view"] == index)
            embedded.update(
                zip(places.tolist(), self._embed(batch["row"][places].tolist(), self._views[index]), strict=True)
            )
        return {"place": batch["place"], "embedding": np.stack([embedded[place] for place in range(len(embedded))])}

    def _embed(self, rows: list[int], view: View) -> np.ndarray:
        store = self._store if view.with_attributes else None
        texts = [store.text(self._encoder.items[row]) if store is not None else "" for row in rows]
        return self._encoder.embed(rows, texts, inputs=view.inputs, title_columns=view.title_columns)


def embed_rows(
    wanted: Mapping[View, np.ndarray],
    encoder: EncoderRef,
    catalogue: CatalogueRef,
    *,
    attributes: str | None,
    pool: PoolConfig,
) -> dict[View, np.ndarray]:
    """Embed catalogue rows in one pass of the pool, in one or several views.

    Args:
        wanted: catalogue rows [N] by view.
        encoder: the encoder, loaded by every actor.
        catalogue: the catalogue, opened by every actor.
        attributes: path of an attribute table; none if no view is with attributes.
        pool: number of actors, their resources and batch size.

    Returns:
        [N, D] float32 by view, in the order of its rows.

    Raises:
        ValueError: a view is with attributes, and `attributes` is none.
    """
    if attributes is None and any(view.with_attributes for view in wanted):
        raise ValueError("embed_rows: a view with attributes needs attributes")
    views = tuple(wanted)
    table = map_rows(
        EmbedActor,
        {
            "row": np.concatenate([wanted[view] for view in views]),
            "view": np.repeat(np.arange(len(views)), [len(wanted[view]) for view in views]),
        },
        pool=pool,
        arguments={"encoder": encoder, "catalogue": catalogue, "attributes": attributes, "views": views},
    )
    embeddings = np.stack(table["embedding"].to_list()).astype(np.float32)
    ends = np.cumsum([len(wanted[view]) for view in views])
    return dict(zip(views, np.split(embeddings, ends[:-1]), strict=True))


def save_embeddings(path: str, rows: np.ndarray, embeddings: np.ndarray) -> None:
    """Write rows [N] and embeddings [N, D] as one safetensors file."""
    from safetensors.numpy import save

    storage.write_bytes(
        path, save({"rows": np.ascontiguousarray(rows), "embeddings": np.ascontiguousarray(embeddings)})
    )


def load_embeddings(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Read what `save_embeddings` wrote: rows [N], embeddings [N, D]."""
    from safetensors.numpy import load

    tensors: dict[str, Any] = load(storage.read_bytes(path))
    return tensors["rows"], tensors["embeddings"]
