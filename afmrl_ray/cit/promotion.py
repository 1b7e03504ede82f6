"""Whether a round is promoted, and whether the run continues after it: pure functions of measured values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from afmrl_ray.config.cit import GateConfig
from afmrl_ray.retrieval.evaluate import Value

GUARDED = {"retrieval": "hit@1", "labels": "probe_accuracy"}
"""Metric of a guarded protocol, by its kind."""


@dataclass(frozen=True)
class Decision:
    """The decision on a round.

    Attributes:
        promoted: whether it is the run's result until a later one is.
        why: one line for each guarded protocol with too large a loss.
    """

    promoted: bool
    why: list[str]


def decide(changes: Mapping[str, Value], gate: GateConfig) -> Decision:
    """Compare a round with the last one that was promoted.

    Args:
        changes: change of each guarded protocol's metric from the last promoted round, paired by query.
        gate: `cit.gate`.
    """
    why = []
    for protocol, change in changes.items():
        # The most favourable value that the interval admits.
        best = change.mean if gate.strict or change.high is None else change.high
        if best < -gate.max_loss:
            interval = "" if change.high is None else f" ({change.low:+.4f} to {change.high:+.4f})"
            why.append(f"{protocol} changes by {change.mean:+.4f}{interval}, more than -{gate.max_loss:g} is lost")
    return Decision(not why, why)


def converged(gains: Sequence[Value], patience: int | None) -> bool:
    """Whether none of the last `patience` rounds gained significantly over the round before it.

    Args:
        gains: of the second round, the third, and so on.
        patience: `cit.patience`.
    """
    if patience is None or len(gains) < patience:
        return False
    return all(gain.low is None or gain.low <= 0 for gain in gains[-patience:])
