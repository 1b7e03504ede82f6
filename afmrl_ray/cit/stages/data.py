"""Stages that make what all others begin with: the catalogue, and small checkpoints where none is given."""

from __future__ import annotations

from functools import partial

from afmrl_ray.catalogue import Catalogue, make_catalogue, open_catalogue, write_catalogue
from afmrl_ray.cit.spec import CATALOGUE, MODELS, StageContext, StageSpec
from afmrl_ray.config import Config
from afmrl_ray.runs import StageOutcome
from afmrl_ray.training.cluster import Demand


def declare_catalogue(config: Config, given: Catalogue | None) -> StageSpec:
    if given is not None:
        parameters = {"fingerprint": given.fingerprint}
        return StageSpec(CATALOGUE, partial(catalogue_stage, given=given), parameters=parameters)
    return StageSpec(CATALOGUE, partial(catalogue_stage, given=None), ("catalogue", "synthetic"))


def catalogue_stage(context: StageContext, *, given: Catalogue | None) -> StageOutcome:
    """Makes the synthetic catalogue, or records the checks of the given one.

    Args:
        given: the catalogue of `catalogue.path`, opened.
    """
    outputs = {}
    if given is None:
        path = context.path("catalogue.parquet")
        write_catalogue(make_catalogue(context.config.synthetic), path)
        outputs["catalogue"] = "catalogue.parquet"
        given = open_catalogue(path, config=context.config.catalogue)
    given.write_quarantine(context.path("quarantine.parquet"))
    outputs["quarantine"] = "quarantine.parquet"
    return StageOutcome(outputs, {"fingerprint": given.fingerprint, "counts": given.counts})


def missing_checkpoints(config: Config) -> tuple[str, ...]:
    """Roles for which the config names no checkpoint."""
    return tuple(role for role in ("encoder", "generator") if getattr(config, role).path is None)


def declare_models(config: Config) -> StageSpec:
    model_fields = ("path", "image", "instruction")
    return StageSpec(
        MODELS,
        models_stage,
        reads=(
            *("run", "tiny", "synthetic", "encoder.kind"),
            *(f"{role}.{name}" for role in ("encoder", "generator") for name in model_fields),
        ),
        upstream={"catalogue": CATALOGUE},
        resources=(Demand(1, {"CPU": 1}),),
    )


def models_stage(context: StageContext) -> StageOutcome:
    """Makes a tiny checkpoint for each model that has no path, one Ray task each."""
    import ray

    from afmrl_ray.cit.tiny import make_tiny

    roles = missing_checkpoints(context.config)
    task = ray.remote(num_cpus=1, max_retries=1)(make_tiny)
    losses = ray.get([task.remote(context.config, role, context.catalogue, context.path(role)) for role in roles])
    return StageOutcome({role: role for role in roles}, dict(zip(roles, losses, strict=True)))
