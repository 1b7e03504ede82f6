"""What a run will do and ask for, before it does anything."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from afmrl_ray.cit.spec import StageSpec, upstream_first
from afmrl_ray.cit.stages import declare, run_names
from afmrl_ray.config import Config
from afmrl_ray.config.cluster import WorkersConfig
from afmrl_ray.training.cluster import Demand, resources_available, total


def declarations(config: Config, *, rounds: int | None = None) -> list[StageSpec]:
    """The declarations of all stages of a run, upstream first.

    Args:
        rounds: none = `cit.rounds`.
    """
    spec_of = cache(lambda name: declare(name, config))
    return [spec_of(name) for name in upstream_first(run_names(config, rounds=rounds), spec_of)]


def resources(config: Config) -> dict[str, list[Demand]]:
    """What each kind of stage holds at once, by the declarations of the first round."""
    return {spec.name.kind: list(spec.resources) for spec in declarations(config, rounds=1) if spec.resources}


def dry_run(config: Config) -> str:
    """The text of `--dry-run`: schedule and resources; a cluster that would be joined is asked for what it has."""
    return describe(config, resources_available(config.ray))


def describe(config: Config, available: Mapping[str, float]) -> str:
    """The derived schedule, and the resources that stages ask for against those available."""
    distill, agcl, rar = config.distill, config.agcl, config.rar
    completions = rar.prompts_per_step * rar.group_size
    stages = ", ".join(str(spec.name) for spec in declarations(config, rounds=1))
    lines = [
        "schedule",
        f"  stages    {stages}" + (f"; likewise to round {config.cit.rounds - 1}" if config.cit.rounds > 1 else ""),
        f"  distill   {distill.steps} steps x {distill.batch_size} items on {_size(distill.workers)} workers",
        f"  rounds    {config.cit.rounds}" + (", after a baseline" if config.cit.baseline else ""),
        f"  agcl      {agcl.steps} steps x {agcl.batch_size} pairs on {_size(agcl.workers)} workers, "
        f"{agcl.batch_size - 1} negatives a query, ZeRO {agcl.workers.zero_stage}, {agcl.adapter.kind}",
        f"  rar       {rar.steps} steps x {rar.prompts_per_step} prompts x {rar.group_size} completions = "
        f"{completions} rollouts of up to {config.generator.max_new_tokens} tokens "
        f"({completions * config.generator.max_new_tokens} tokens a step), "
        f"micro-batches of {rar.tokens_per_microbatch} tokens, {rar.num_learners} learners",
        f"  actors    {rar.rollout.pool.num_workers} rollout, {rar.reward.pool.num_workers} reward, "
        f"{config.annotate.pool.num_workers} annotate, {config.evaluation.pool.num_workers} embed",
        "resources asked for at once",
    ]
    for kind, demands in resources(config).items():
        amounts = total(demands)
        short = [name for name, amount in amounts.items() if amount > available.get(name, 0)]
        lines.append(
            f"  {kind:<11}"
            + ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount)
            + (f"  MORE THAN AVAILABLE ({', '.join(short)})" if short else "")
        )
    lines.append("resources available")
    lines.append("  " + ", ".join(f"{available.get(name, 0):g} {name}" for name in ("CPU", "GPU")))
    return "\n".join(lines)


def _size(workers: WorkersConfig) -> str:
    return (
        str(workers.num_workers) if workers.min_workers is None else f"{workers.min_workers} to {workers.num_workers}"
    )
