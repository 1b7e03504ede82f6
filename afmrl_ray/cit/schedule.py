"""What a run will do and ask for, before it does anything."""

from __future__ import annotations

from collections.abc import Mapping

from afmrl_ray.config import Config
from afmrl_ray.config.cluster import PoolConfig, WorkersConfig


def resources(config: Config) -> dict[str, dict[str, float]]:
    """CPUs and GPUs that each kind of stage holds at once."""
    rar = config.rar
    learners = max(1, rar.num_learners)
    parts = [_pool(rar.rollout.pool), _pool(rar.reward.pool)]
    if rar.num_learners:
        parts.append({"CPU": learners * rar.cpus_per_learner, "GPU": learners * rar.gpus_per_learner})
    return {
        "distill": _workers(config.distill.workers),
        "attributes": _pool(config.annotate.pool),
        "agcl": _workers(config.agcl.workers),
        "rar": {key: sum(part[key] for part in parts) for key in ("CPU", "GPU")},
        "evaluate": _pool(config.evaluation.pool),
    }


def _workers(workers: WorkersConfig) -> dict[str, float]:
    return {
        "CPU": workers.num_workers * workers.cpus_per_worker,
        "GPU": float(workers.num_workers * workers.use_gpu),
    }


def _pool(pool: PoolConfig) -> dict[str, float]:
    return {"CPU": pool.num_workers * pool.cpus_per_worker, "GPU": pool.num_workers * pool.gpus_per_worker}


def describe(config: Config, there: Mapping[str, float] | None = None) -> str:
    """The derived schedule and the resources asked for, against those there if they are known."""
    distill, agcl, rar = config.distill, config.agcl, config.rar
    share = agcl.batch_size // agcl.workers.num_workers
    completions = rar.prompts_per_step * rar.group_size
    lines = [
        "schedule",
        f"  distill   {distill.steps} steps x {distill.batch_size} listings on {distill.workers.num_workers} workers",
        f"  rounds    {config.cit.rounds}" + (", after a baseline" if config.cit.baseline else ""),
        f"  agcl      {agcl.steps} steps x {agcl.batch_size} pairs ({share} a worker), "
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
        lines.append(f"  {stage:<11}" + ", ".join(f"{amount:g} {name}" for name, amount in asked.items() if amount))
    if there is None:
        lines.append(
            "resources there: unknown until a cluster is joined (ray.address, RAY_ADDRESS) or ray.num_cpus is set"
        )
    else:
        lines.append("resources there")
        lines.append("  " + ", ".join(f"{there.get(name, 0):g} {name}" for name in ("CPU", "GPU")))
    return "\n".join(lines)
