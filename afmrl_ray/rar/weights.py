"""The tensors that learners push to rollout actors: selection, checks, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from afmrl_ray.errors import CheckpointError


def trained_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Trained parameters by name; under LoRA the adapter only."""
    return {name: parameter.detach() for name, parameter in policy.named_parameters() if parameter.requires_grad}


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Make sure that tensors have the names and shapes of the policy's.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    if own.keys() != tensors.keys():
        differing = sorted(own.keys() ^ tensors.keys())
        raise CheckpointError(f"pushed weights do not fit the policy: {len(differing)} names differ ({differing[0]})")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(f"pushed weights do not fit the policy: {name} is {tuple(tensor.shape)}")


def load_tensors(policy: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy pushed weights into a policy, strictly.

    Raises:
        CheckpointError: see `check_fit`.
    """
    own = trained_tensors(policy)
    check_fit(own, tensors)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous().cpu()
        total.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        total.update(np.ascontiguousarray(tensor.view(torch.uint8).numpy()).data)
    return total.hexdigest()
