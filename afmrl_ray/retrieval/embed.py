"""Embeddings of many items by a pool of Ray Data actors."""

from __future__ import annotations

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
from afmrl_ray.models.dual_encoder import DualEncoder, DualProcessor, dual_text, embed_dual_inputs
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
    """A trained encoder as actors load it.

    Attributes:
        path: model or adapter folder, or hub name.
        config: how items are shown to it.
    """

    path: str
    config: EncoderConfig


class Encoder:
    """A frozen encoder over a catalogue; plain code that actors and tests call alike."""

    def __init__(self, encoder: EncoderRef, catalogue: CatalogueRef) -> None:
        if encoder.config.kind != "qwen2_vl":
            raise ConfigError(
                f"encoder.kind {encoder.config.kind} has no prefixes to share between attribute texts, so RAR cannot "
                "search with it; set encoder.kind=qwen2_vl"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_trained(encoder.path, "encoder", dtype=encoder.config.dtype, device=device)
        self._processor = ItemProcessor.from_pretrained(encoder.path, encoder.config.image)
        self._model = EmbeddingModel(model).eval()
        self._config = encoder.config
        cached = encoder.config.vision_cache
        self._cache = VisionCache(model.requires_grad_(False), self._processor, cached) if cached.enabled else None
        self._catalogue = catalogue.open()
        self._items = self._catalogue.column("item_id")

    @property
    def items(self) -> list[str]:
        """Item id of every catalogue row."""
        return self._items

    def share_prefixes(self) -> None:
        """Let `embed_groups` be called.

        Raises:
            ValueError: see `models.shared_prefix.use_shared_prefix`.
        """
        use_shared_prefix(self._model.backbone)

    def item_rows(
        self, row: int, texts: Sequence[str], *, inputs: Inputs, title_columns: tuple[str, ...] = ("title",)
    ) -> list[ModelInput]:
        """Sequences of one catalogue row shown with each of the attribute texts."""
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
        """Embed groups of `item_rows`, what the rows of a group begin with computed once.

        Args:
            groups: rows of one item each.
            tokens: most per forward pass, visual ones counted.

        Returns:
            [K, D] float32, of unit length, group after group.
        """
        return embed_groups(self._model, groups, self._processor.pad_id, tokens=tokens).cpu().numpy()

    @torch.no_grad()
    def embed_each(self, rows: Sequence[ModelInput], *, tokens: int) -> np.ndarray:
        """Embed `item_rows` one by one, nothing shared; arguments and result as in `embed_groups`."""
        found: dict[int, np.ndarray] = {}
        for part in cut_by_tokens([len(row) for row in rows], tokens):
            batch = collate([rows[place] for place in part], self._processor.pad_id, self._model.device)
            found.update(zip(part, self._model(**batch).cpu().numpy(), strict=True))
        return np.stack([found[place] for place in range(len(rows))])

    @torch.no_grad()
    def embed(
        self, rows: list[int], texts: list[str], *, inputs: Inputs, title_columns: tuple[str, ...] = ("title",)
    ) -> np.ndarray:
        """Embed catalogue rows shown with the given attribute texts.

        Returns:
            [B, D] float32, of unit length.
        """
        built = [
            self.item_rows(row, [text], inputs=inputs, title_columns=title_columns)[0]
            for row, text in zip(rows, texts, strict=True)
        ]
        return self._model(**collate(built, self._processor.pad_id, self._model.device)).cpu().numpy()


class DualEncoderEmbedder:
    """A frozen dual encoder over a catalogue, for the same calls as far as it has them."""

    def __init__(self, encoder: EncoderRef, catalogue: CatalogueRef) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_trained(encoder.path, "dual_encoder", dtype=encoder.config.dtype, device=device)
        self._model = DualEncoder(model).eval()
        self._processor = DualProcessor.from_pretrained(fetch(encoder.path), model)
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
        """See `Encoder.embed`."""
        built = []
        for row, text in zip(rows, texts, strict=True):
            title = self._catalogue.title(row, title_columns) if inputs != "image" else ""
            image = self._catalogue.image(row) if inputs != "text" else None
            built.append(self._processor.model_input(image, dual_text(title, text)))
        return embed_dual_inputs(self._model, self._processor, built).cpu().numpy()


def open_encoder(encoder: EncoderRef, catalogue: CatalogueRef) -> Encoder | DualEncoderEmbedder:
    """The encoder of `encoder.kind`, to embed items with."""
    return (
        DualEncoderEmbedder(encoder, catalogue)
        if encoder.config.kind == "dual_encoder"
        else Encoder(encoder, catalogue)
    )


@dataclass(frozen=True)
class View:
    """How items are shown to the encoder.

    Attributes:
        inputs: image, text or both.
        title_columns: columns that make up the title.
        with attributes: whether the stored attributes are shown too.
    """

    inputs: Inputs
    title_columns: tuple[str, ...]
    with_attributes: bool


class EmbedActor:
    """Ray Data's shell around `Encoder`; column `view` of a batch says how each row is shown."""

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
    """Embed catalogue rows in one pass of the pool, however many views of them are wanted.

    Args:
        wanted: catalogue rows [N] of each view.
        attributes: path of an attribute table, or none if no view is with attributes.

    Returns:
        [N, D] float32 of each view, in the order of its rows.

    Raises:
        ValueError: a view is with attributes and there are no attributes.
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
