"""Embeddings of sequences with common prefixes, each of which is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.microbatches import cut_shared_prefix
from afmrl_ray.models.model_input import ModelInput
from afmrl_ray.models.shared_prefix import pack


def split_at_common_prefix(inputs: Sequence[ModelInput]) -> tuple[ModelInput, list[np.ndarray]]:
    """Split sequences into their common prefix and continuations of at least one token.

    Args:
        inputs: at least one, all of the same images, with at least one token after them.

    Returns:
        The prefix with the images, and the rest of each sequence, [n] token ids.
    """
    shortest = min(len(each) for each in inputs)
    ids = np.stack([each.input_ids[:shortest] for each in inputs])
    differs = np.flatnonzero((ids != ids[0]).any(axis=0))
    length = int(differs[0]) if len(differs) else shortest
    length = min(length, shortest - 1)
    first = inputs[0]
    prefix = ModelInput(
        first.input_ids[:length], first.token_types[:length], first.positions[:, :length], first.visuals
    )
    return prefix, [each.input_ids[length:] for each in inputs]


def group_tokens(inputs: Sequence[ModelInput]) -> int:
    """Tokens of a group's packed sequence, its prefix counted once."""
    prefix, continuations = split_at_common_prefix(inputs)
    return len(prefix) + sum(map(len, continuations))


def embed_groups(model: EmbeddingModel, groups: Sequence[Sequence[ModelInput]], pad_id: int, *, tokens: int) -> Tensor:
    """Embed groups of sequences, each group's common prefix computed once per forward pass.

    Args:
        model: `use_shared_prefix` must have been applied to its backbone.
        groups: at least one sequence each, all of the same images.
        pad_id: padding token.
        tokens: limit per forward pass, visual ones counted; a longer sequence has a pass of its own.

    Returns:
        [K, D] float32, of unit length, group after group.
    """
    split = [split_at_common_prefix(group) for group in groups]
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    continuations = [ids for _, own in split for ids in own]
    prefixes = [len(split[owner][0]) for owner in owners]
    embedded = []
    for part in cut_shared_prefix(owners.tolist(), prefixes, [len(ids) for ids in continuations], tokens):
        present, starts = np.unique(owners[part], return_index=True)
        own = [continuations[part][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        embedded.append(model.embed_packed(pack([split[owner][0] for owner in present], own, pad_id, model.device)))
    return torch.cat(embedded)
