"""Messages between the trainer and its rollout actors; importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Weights:
    """Trained tensors in the object store; the reference is wrapped in a list, so that it travels as a reference."""

    version: int
    fingerprint: str
    reference: list[Any]


@dataclass(frozen=True)
class PromptGroup:
    """The G completions of one prompt.

    Attributes:
        row: catalogue row of the prompt.
        version: version of the weights that sampled them.
        ids: [G, C] token ids.
        mask: [G, C] True at sampled tokens.
        logp: [G, C] float32 log-probabilities at the sampling temperature.
        texts: G texts, each with whether it ended with an end-of-text token.
    """

    row: int
    version: int
    ids: np.ndarray
    mask: np.ndarray
    logp: np.ndarray
    texts: list[tuple[str, bool]]
