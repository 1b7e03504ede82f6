"""Subcommands that run one stage of a run, with whatever it needs before it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from afmrl_ray.cli import job_main, round_argument
from afmrl_ray.config import Config


def dry_run(config: Config) -> str:
    """See `cit.schedule.dry_run`."""
    from afmrl_ray.cit.schedule import dry_run

    return dry_run(config)


def _main(description: str, kind: str, argv: Sequence[str] | None, *, of_a_round: bool = True) -> int:
    def body(config: Config, options: argparse.Namespace) -> None:
        from afmrl_ray.cit.driver import open_run
        from afmrl_ray.runs import StageName

        with open_run(config) as pipeline:
            stage = pipeline.stage(StageName(kind, options.round if of_a_round else None))
            print(f"{stage.name}: {stage.directory}")

    return job_main(description, body, argv, arguments=round_argument if of_a_round else None, dry_run=dry_run)


def distill(argv: Sequence[str] | None = None) -> int:
    return _main("Fine-tune the generator on the teacher's attributes.", "distill", argv, of_a_round=False)


def annotate(argv: Sequence[str] | None = None) -> int:
    return _main("Write attributes with the generator as it is before a round.", "attributes", argv)


def train_encoder(argv: Sequence[str] | None = None) -> int:
    return _main("Train the encoder of a round by attribute-guided contrastive learning.", "agcl", argv)


def train_generator(argv: Sequence[str] | None = None) -> int:
    return _main("Train the generator of a round by GRPO, rewarded with the frozen encoder's retrieval.", "rar", argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    return _main("Measure a round by every protocol.", "evaluate", argv)
