"""The stages of a run, one module for each group: declarations and the functions that do the work.

Round r: attributes-r -> agcl-r -> gallery-r -> rar-r -> attributes-(r+1) -> evaluate-r -> promotion-r. The attributes
of round r + 1 are written by the generator after the RAR of round r; round r is evaluated with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from afmrl_ray.catalogue import Catalogue
from afmrl_ray.cit.spec import StageSpec
from afmrl_ray.cit.stages import attributes, data, evaluation, index, promotion, training
from afmrl_ray.config import Config
from afmrl_ray.runs import StageName

Declare = Callable[[Config], StageSpec]
DeclareRound = Callable[[Config, int], StageSpec]

ONCE: dict[str, Declare] = {
    "models": data.declare_models,
    "baselines": evaluation.declare_baselines,
    "labels": attributes.declare_labels,
    "labels-pairs": attributes.declare_pair_labels,
    "oracle": attributes.declare_oracle,
    "distill": training.declare_distill,
    "baseline": training.declare_baseline,
    "evaluate-baseline": evaluation.declare_evaluate_baseline,
}
"""Stages that belong to no round; `catalogue` is one too, and takes the opened catalogue."""
BY_ROUND: dict[str, DeclareRound] = {
    "attributes": attributes.declare_attributes,
    "negatives": training.declare_negatives,
    "agcl": training.declare_agcl,
    "gallery": training.declare_gallery,
    "rar": training.declare_rar,
    "evaluate": evaluation.declare_evaluate,
    "promotion": promotion.declare_promotion,
    "index": index.declare_index,
    "query-attributes": attributes.declare_query_attributes,
}


def declare(name: StageName, config: Config, given: Catalogue | None = None) -> StageSpec:
    """The declaration of a stage.

    Args:
        given: the catalogue of `catalogue.path`, opened; none = the synthetic one.

    Raises:
        KeyError: there is no stage of that name.
    """
    if name == StageName("catalogue"):
        return data.declare_catalogue(config, given)
    if name.round is None and name.kind in ONCE:
        return ONCE[name.kind](config)
    if name.round is not None and name.kind in BY_ROUND:
        return partial(BY_ROUND[name.kind], config)(name.round)
    raise KeyError(f"there is no stage {name}; kinds are {', '.join(sorted({'catalogue', *ONCE, *BY_ROUND}))}")


def run_names(config: Config, *, rounds: int | None = None) -> list[StageName]:
    """The stages that a whole run asks for, in order; their upstream stages come with them.

    Args:
        rounds: none = `cit.rounds`.
    """
    names = [StageName("baselines")]
    if config.cit.baseline:
        names.append(StageName("evaluate-baseline"))
    return names + [StageName("promotion", number) for number in range(rounds or config.cit.rounds)]
