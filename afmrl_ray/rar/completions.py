"""What sampled completions are worth: the parser first, then the retrieval of what it accepts.

Only the parser gives `rar.reward.invalid`. What fails for reasons of infrastructure is NaN: not a bad answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes, parse_attributes
from afmrl_ray.rar.reward_spec import Query


def parse_completions(
    texts: Sequence[tuple[str, bool]], *, max_attributes: int
) -> list[Attributes | InvalidAttributes]:
    """What the strict parser makes of completions (text, whether it ended by itself)."""
    return [parse_attributes(text, max_attributes=max_attributes, complete=complete) for text, complete in texts]


def reward_completions(
    rows: Sequence[int],
    parsed: Sequence[Attributes | InvalidAttributes],
    score: Callable[[Sequence[Query]], np.ndarray],
    *,
    invalid: float,
) -> np.ndarray:
    """Rewards of completions: `invalid` where the parser refused, else what the retrieval of the enriched query gives.

    Args:
        rows: catalogue row of each completion's prompt.
        parsed: what the parser made of each completion.
        score: scores queries (row, attribute text); refused completions never reach it.

    Returns:
        [len(rows)] float64, NaN where scoring failed.
    """
    rewards = np.full(len(rows), invalid, dtype=np.float64)
    valid = [index for index, attributes in enumerate(parsed) if not isinstance(attributes, InvalidAttributes)]
    if valid:
        rewards[valid] = score([(rows[index], format_attributes(parsed[index])) for index in valid])  # type: ignore[arg-type]
    return rewards
