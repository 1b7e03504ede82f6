"""Embeddings of sequences that begin alike: what the rows of a group share is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.microbatches import cut_shared_prefix
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.shared_prefix import pack


def split_at_common_prefix(rows: Sequence[ModelInput]) -> tuple[ModelInput, list[np.ndarray]]:
    """Cut rows after the tokens that all of them begin with; each keeps at least its last token.

    Args:
        rows: at least one, all of the same images, after which each has at least one token.

    Returns:
        The prefix with the images, and what follows it in each row, [n] token ids.
    """
    shortest = min(len(row) for row in rows)
    ids = np.stack([row.input_ids[:shortest] for row in rows])
    differs = np.flatnonzero((ids != ids[0]).any(axis=0))
    length = int(differs[0]) if len(differs) else shortest
    length = min(length, shortest - 1)
    first = rows[0]
    prefix = ModelInput(
        first.input_ids[:length], first.token_types[:length], first.positions[:, :length], first.visuals
    )
    return prefix, [row.input_ids[length:] for row in rows]


def group_tokens(rows: Sequence[ModelInput]) -> int:
    """Tokens of a group's packed sequence, its prefix counted once."""
    prefix, continuations = split_at_common_prefix(rows)
    return len(prefix) + sum(map(len, continuations))


def embed_groups(model: EmbeddingModel, groups: Sequence[Sequence[ModelInput]], pad_id: int, *, tokens: int) -> Tensor:
    """Embed groups of rows, each group's common prefix computed once per forward pass.

    Args:
        model: whose backbone was given to `use_shared_prefix`.
        groups: rows of the same images each, at least one.
        pad_id: of the tokenizer.
        tokens: most per forward pass, visual ones counted; a longer row stands alone.

    Returns:
        [K, D] float32, of unit length, group after group.
    """
    split = [split_at_common_prefix(rows) for rows in groups]
    owners = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups])
    continuations = [ids for _, own in split for ids in own]
    prefixes = [len(split[owner][0]) for owner in owners]
    embedded = []
    for part in cut_shared_prefix(owners.tolist(), prefixes, [len(ids) for ids in continuations], tokens):
        here, starts = np.unique(owners[part], return_index=True)
        own = [continuations[part][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        embedded.append(model.embed_packed(pack([split[owner][0] for owner in here], own, pad_id, model.device)))
    return torch.cat(embedded)
