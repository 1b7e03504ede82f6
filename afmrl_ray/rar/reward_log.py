"""The reward service in the trainer's log: what each step cost and lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from afmrl_ray.rar.reward import CAUSES, RewardClient
from afmrl_ray.rar.reward_meter import ServiceStats, since, summed


class ServiceLog:
    """Differences between steps of what actors and client have counted."""

    def __init__(self) -> None:
        self._before: dict[str, ServiceStats] = {}
        self._failures: Counter[str] = Counter()

    def step(self, client: RewardClient) -> dict[str, float]:
        """`reward_service_*` since the last call: counts and seconds over all actors, and failed requests by cause.

        What is a largest size, or the state of now, is told as it is.
        """
        stats = client.stats()
        counted = asdict(summed(since(now, self._before.get(actor)) for actor, now in stats.items()))
        self._before |= stats
        failures = Counter(client.failures)
        counted |= {f"failed_{cause}": failures[cause] - self._failures[cause] for cause in CAUSES}
        self._failures = failures
        counted["batch_queries_mean"] = counted["scored"] / max(1, counted["batches"])
        return {f"reward_service_{name}": float(value) for name, value in counted.items()}
