"""What a run will do and ask for, before it does anything."""

from __future__ import annotations

from collections.abc import Mapping

from afmrl_ray.config import Config
from afmrl_ray.config.cluster import WorkersConfig
from afmrl_ray.training.cluster import Demand, pool_demand, resources_available, total, workers_demand


def resources(config: Config) -> dict[str, list[Demand]]:
    """What each kind of stage holds at once."""
    rar = config.rar
    learners = Demand(rar.num_learners, {"CPU": rar.cpus_per_learner, "GPU": rar.gpus_per_learner})
    return {
        "distill": [workers_demand(config.distill.workers)],
        "attributes": [pool_demand(config.annotate.pool)],
        "agcl": [workers_demand(config.agcl.workers)],
        "rar": [pool_demand(rar.rollout.pool), pool_demand(rar.reward.pool), *([learners] if rar.num_learners else [])],
        "evaluate": [pool_demand(config.evaluation.pool)],
    }


def dry_run(config: Config) -> str:
    """What `--dry-run` prints after the config; a cluster that would be joined is asked what it has."""
    return describe(config, resources_available(config.ray))


def describe(config: Config, there: Mapping[str, float]) -> str:
    """The derived schedule, and the resources asked for against those there."""
    distill, agcl, rar = config.distill, config.agcl, config.rar
    completions = rar.prompts_per_step * rar.group_size
    lines = [
        "schedule",
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
    for stage, asked in resources(config).items():
        amounts = total(asked)
        short = [name for name, amount in amounts.items() if amount > there.get(name, 0)]
        lines.append(
            f"  {stage:<11}"
            + ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount)
            + (f"  MORE THAN THERE IS ({', '.join(short)})" if short else "")
        )
    lines.append("resources there")
    lines.append("  " + ", ".join(f"{there.get(name, 0):g} {name}" for name in ("CPU", "GPU")))
    return "\n".join(lines)


def _size(workers: WorkersConfig) -> str:
    return (
        str(workers.num_workers) if workers.min_workers is None else f"{workers.min_workers} to {workers.num_workers}"
    )
