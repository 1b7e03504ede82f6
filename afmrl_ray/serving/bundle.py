"""What is served of a round: its encoder, its generator, its index, and where each was committed."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from afmrl_ray import storage
from afmrl_ray.cit.stages.index import ITEMS, VECTORS
from afmrl_ray.config import validate
from afmrl_ray.config.catalogue import Inputs
from afmrl_ray.config.index import IndexConfig
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.runs.directory import RunDirectory, Stage


class Bundle(BaseModel):
    """A round that can be served. Embeddings and index of a round belong together: every call names its bundle."""

    model_config = ConfigDict(frozen=True)

    run: str
    round: int
    key: str
    """Round and digest of the three stages, e.g. `r1-0f3a9c5d2b7e`."""
    encoder_path: str
    encoder: EncoderConfig
    generator_path: str
    generator: GeneratorConfig
    index_path: str
    index: IndexConfig
    fingerprints: dict[str, str]
    """Of encoder, generator, attributes and index."""
    gallery_inputs: Inputs
    """What of an item the index holds."""
    dimensions: int
    metrics: dict[str, Any]
    """Headline metrics of the round's evaluation, and those of the index."""

    @property
    def vectors_file(self) -> str:
        return storage.join(self.index_path, VECTORS)

    @property
    def items_file(self) -> str:
        return storage.join(self.index_path, ITEMS)


def split_run(path: str) -> RunDirectory:
    """The run at a folder or URI.

    Raises:
        ConfigError: there is none.
    """
    path = storage.absolute(path)
    run = RunDirectory(*storage.split(path))
    if not storage.exists(storage.join(run.path, "run.json")):
        raise ConfigError(f"run: {path} is no run (it has no run.json); name the folder of one, such as runs/demo")
    return run


def rounds_with(run: RunDirectory, prefix: str) -> list[int]:
    """Rounds N whose stage `<prefix>N` is committed, ascending."""
    names = [stage.name.removeprefix(prefix) for stage in run.stages() if stage.name.startswith(prefix)]
    return sorted(int(name) for name in names if name.isdecimal())


def best_round(run: RunDirectory) -> int:
    """The last round that was promoted; where none was decided on, the last one that was evaluated.

    Raises:
        ConfigError: there is neither.
    """
    decided = [
        (number, stage.metrics["promoted"])
        for number in rounds_with(run, "promotion-r")
        if (stage := run.committed(f"promotion-r{number}")) is not None
    ]
    promoted = [number for number, yes in decided if yes]
    found = promoted or rounds_with(run, "evaluate-r")
    if not found:
        raise ConfigError(f"{run.path} has no round that was evaluated; run jobs/run_cit.py first")
    return found[-1]


def open_bundle(run: RunDirectory, number: int | None = None) -> Bundle:
    """The bundle of a round.

    Args:
        number: the round; none = see `best_round`.

    Raises:
        ConfigError: the round has no index, or the index was built from other models than those that are committed.
    """
    number = best_round(run) if number is None else number
    index = _needed(run, f"index-r{number}", number)
    encoder = _needed(run, f"agcl-r{number}", number)
    generator = _needed(run, f"rar-r{number}", number)
    attributes = _needed(run, f"attributes-r{number + 1}", number)
    built_from = index.inputs["upstream"]
    for stage in (encoder, attributes):
        if built_from.get(stage.name) != stage.fingerprint:
            raise ConfigError(
                f"{run.path}: the index of round {number} was built from another {stage.name}; "
                f"build it again: jobs/build_index.py --round {number}"
            )
    config = validate(run.read_run()["config"])
    fingerprints = {
        "encoder": encoder.fingerprint,
        "generator": generator.fingerprint,
        "attributes": attributes.fingerprint,
        "index": index.fingerprint,
    }
    evaluated = run.committed(f"evaluate-r{number}")
    primary_protocol = (
        evaluated.metrics["protocols"][config.evaluation.primary_protocol]["metrics"] if evaluated is not None else {}
    )
    return Bundle(
        run=run.path,
        round=number,
        key=f"r{number}-{storage.digest(fingerprints)[:12]}",
        encoder_path=encoder.output("model"),
        encoder=config.encoder,
        generator_path=generator.output("model"),
        generator=config.generator,
        index_path=index.directory,
        index=config.index,
        fingerprints=fingerprints,
        gallery_inputs=index.metrics["inputs"],
        dimensions=index.metrics["dimensions"],
        metrics={
            "primary_protocol": {
                "protocol": config.evaluation.primary_protocol,
                **{k: v["mean"] for k, v in primary_protocol.items()},
            },
            "index": index.metrics,
        },
    )


def _needed(run: RunDirectory, name: str, number: int) -> Stage:
    stage = run.committed(name)
    if stage is None:
        with_index = rounds_with(run, "index-r")
        there = f"; rounds with an index: {', '.join(map(str, with_index))}" if with_index else ""
        raise ConfigError(
            f"{run.path}: round {number} cannot be served, stage {name} is not committed{there}. "
            f"Run jobs/build_index.py --round {number} with the run's config"
        )
    return stage
