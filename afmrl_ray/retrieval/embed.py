"""Embeddings of many listings by a pool of Ray Data actors."""

from __future__ import annotations

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
from afmrl_ray.models.adapters import load_trained
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.listing import ListingProcessor, collate
from afmrl_ray.models.pool import map_rows
from afmrl_ray.models.prompts import encoder_row


@dataclass(frozen=True)
class EncoderRef:
    """A trained encoder as actors load it.

    Attributes:
        path: model or adapter folder, or hub name.
        config: how listings are shown to it.
    """

    path: str
    config: EncoderConfig


class Encoder:
    """A frozen encoder over a catalogue; plain code that actors and tests call alike."""

    def __init__(self, encoder: EncoderRef, catalogue: CatalogueRef) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_trained(encoder.path, "encoder", dtype=encoder.config.dtype, device=device)
        self._processor = ListingProcessor.from_pretrained(encoder.path, encoder.config.picture)
        self._model = EmbeddingModel(model).eval()
        self._config = encoder.config
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
        """Embed catalogue rows shown with the given attribute texts.

        Returns:
            [B, D] float32, of unit length.
        """
        built = [
            encoder_row(
                self._processor,
                self._catalogue,
                row,
                config=self._config,
                inputs=inputs,
                title_columns=title_columns,
                attributes=text,
            )
            for row, text in zip(rows, texts, strict=True)
        ]
        return self._model(**collate(built, self._processor.pad_id, self._model.device)).cpu().numpy()


class EmbedActor:
    """Ray Data's shell around `Encoder`."""

    def __init__(
        self,
        encoder: EncoderRef,
        catalogue: CatalogueRef,
        attributes: str | None,
        inputs: Inputs,
        title_columns: tuple[str, ...],
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self._encoder = Encoder(encoder, catalogue)
        self._store = read_attributes(attributes) if attributes is not None else None
        self._inputs, self._title_columns = inputs, title_columns

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = batch["row"].tolist()
        texts = [self._store.text(self._encoder.items[row]) if self._store is not None else "" for row in rows]
        embeddings = self._encoder.embed(rows, texts, inputs=self._inputs, title_columns=self._title_columns)
        return {"row": batch["row"], "embedding": embeddings}


def embed_rows(
    rows: np.ndarray,
    encoder: EncoderRef,
    catalogue: CatalogueRef,
    *,
    attributes: str | None,
    inputs: Inputs,
    title_columns: tuple[str, ...],
    pool: PoolConfig,
) -> np.ndarray:
    """Embed catalogue rows with their stored attributes.

    Args:
        rows: [N] catalogue rows.
        attributes: path of an attribute table, or none for inputs without attributes.

    Returns:
        [N, D] float32 in the order of `rows`.
    """
    table = map_rows(
        EmbedActor,
        rows,
        pool=pool,
        arguments={
            "encoder": encoder,
            "catalogue": catalogue,
            "attributes": attributes,
            "inputs": inputs,
            "title_columns": title_columns,
        },
    )
    return np.stack(table["embedding"].to_list()).astype(np.float32)


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
