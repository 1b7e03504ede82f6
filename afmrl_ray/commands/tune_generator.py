"""Compare settings of a round's RAR with Ray Tune, from the same start, by the gain in reward on held-out prompts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ray import tune
from yaml import safe_load

from afmrl_ray import storage
from afmrl_ray.cit.driver import open_run
from afmrl_ray.cit.schedule import dry_run, resources
from afmrl_ray.cit.stages.training import rar_job
from afmrl_ray.cli import job_main, round_argument
from afmrl_ray.config import Config, with_values
from afmrl_ray.errors import ConfigError
from afmrl_ray.rar.tune import RARTrainable
from afmrl_ray.report.text_table import TextTable, print_tables
from afmrl_ray.runs import StageName

COLUMNS = (
    "eval/reward_before",
    "eval/reward_after",
    "eval/reward_gain",
    "actor/kl",
    "rollout/invalid_fraction",
    "rollout/attribute_pairs",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    round_argument(parser)
    parser.add_argument(
        "--grid",
        action="append",
        metavar="FIELD=V1,V2",
        help="values to try of a field; may be repeated (default: rar.kl_coef=0.0,0.01)",
    )


def grid(text: str, config: Config) -> tuple[str, list[Any]]:
    """The field and the values of a `--grid` option.

    Raises:
        ConfigError: it is not `field=v1,v2`, or a value is invalid.
    """
    field, equals, values = text.partition("=")
    if not equals or not values:
        raise ConfigError(f"--grid {text!r} is not a grid; write field=value,value")
    found = [safe_load(value) for value in values.split(",")]
    for value in found:
        with_values(config, {field: value})
    return field, found


def trial_resources(config: Config) -> tune.PlacementGroupFactory:
    """Resources of a trial's actors and learners; Tune runs as many trials at once as fit."""
    asked = [demand.each for demand in resources(config)["rar"] for _ in range(demand.count)]
    # The trial itself needs no resources, but a bundle without resources is never placed.
    return tune.PlacementGroupFactory([{"memory": 1}, *({name: n for name, n in each.items() if n} for each in asked)])


def body(config: Config, options: argparse.Namespace) -> None:
    space = dict(grid(text, config) for text in options.grid or ["rar.kl_coef=0.0,0.01"])
    with open_run(config) as pipeline:
        name = StageName("rar", options.round)
        directory = storage.join(pipeline.run.path, "tune", str(name))
        job = rar_job(pipeline.context(name, directory))
        trainable = tune.with_parameters(RARTrainable, base=config, job=job)
        results = tune.Tuner(
            tune.with_resources(trainable, lambda changes: trial_resources(with_values(config, changes))),
            param_space={field: tune.grid_search(values) for field, values in space.items()},
            run_config=tune.RunConfig(name="trials", storage_path=directory, verbose=1),
        ).fit()
    for error in results.errors:
        raise error
    fields = list(space)
    rows = [
        [*(str(result.config[field]) for field in fields), *(f"{result.metrics[name]:.4f}" for name in COLUMNS)]
        for result in results
    ]
    print_tables([TextTable("trials", [*fields, *COLUMNS], rows)])
    best = results.get_best_result("eval/reward_gain", "max")
    print("best: " + " ".join(f"{field}={best.config[field]}" for field in fields))


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments, dry_run=dry_run)
