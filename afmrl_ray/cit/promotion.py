"""Whether a round is promoted, and whether the run goes on after it: pure functions of measured numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from afmrl_ray.config.cit import GateConfig
from afmrl_ray.retrieval.evaluate import Value

GUARDED = {"retrieval": "hit@1", "labels": "probe_accuracy"}
"""Metric of a guarded protocol, by its kind."""


@dataclass(frozen=True)
class Decision:
    """What became of a round.

    Attributes:
        promoted: whether it is the run's result until a later one is.
        why: one line for each guarded protocol that it lost too much on.
    """

    promoted: bool
    why: list[str]


def decide(changes: Mapping[str, Value], gate: GateConfig) -> Decision:
    """Hold a round against the last one that was promoted.

    Args:
        changes: difference of each guarded protocol's metric, paired by query, the round less the last one.
        gate: `cit.gate`.
    """
    why = []
    for protocol, change in changes.items():
        # The best that the change may be is its upper end.
        best = change.mean if gate.strict or change.high is None else change.high
        if best < -gate.max_loss:
            interval = "" if change.high is None else f" ({change.low:+.4f} to {change.high:+.4f})"
            why.append(f"{protocol} changes by {change.mean:+.4f}{interval}, more than -{gate.max_loss:g} is lost")
    return Decision(not why, why)


def converged(gains: Sequence[Value], patience: int | None) -> bool:
    """Whether the last `patience` rounds each gained nothing for sure over the round before.

    Args:
        gains: of the second round, the third, and so on.
        patience: `cit.patience`.
    """
    if patience is None or len(gains) < patience:
        return False
    return all(gain.low is None or gain.low <= 0 for gain in gains[-patience:])
