"""What is served of a round: its encoder, its generator and its index, as their stages committed them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from afmrl_ray import storage
from afmrl_ray.config.index import IndexConfig
from afmrl_ray.config.load import validate_as
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.model_settings import EncoderSettings, GeneratorSettings
from afmrl_ray.runs import RunReader, Stage, StageName


class Bundle(BaseModel):
    """A round that can be served. Embeddings are comparable within a bundle only, so every call names its bundle.

    Attributes:
        run: path of the run.
        round: its number.
        key: round and digest of `fingerprints`, e.g. `r1-0f3a9c5d2b7e`.
        encoder_path: model folder.
        encoder: settings that the encoder was trained with, from its folder.
        generator_path: model folder.
        generator: settings that the generator was trained with, from its folder.
        index_path: folder of the files that `retrieval.item_table` names.
        index: settings that the index was built with.
        fingerprints: of the stages of encoder, generator, attributes and index.
        dimensions: of the embeddings.
        metrics: those of the primary protocol in the round's evaluation, and those of the index.
    """

    model_config = ConfigDict(frozen=True)

    run: str
    round: int
    key: str
    encoder_path: str
    encoder: EncoderSettings
    generator_path: str
    generator: GeneratorSettings
    index_path: str
    index: IndexConfig
    fingerprints: dict[str, str]
    dimensions: int
    metrics: dict[str, Any]


def best_round(run: RunReader) -> int:
    """The last promoted round, or the last evaluated one if none has been judged or promoted.

    Raises:
        ConfigError: no round has been evaluated.
    """
    judged = [
        (number, stage.metrics["promoted"])
        for number in run.rounds("promotion")
        if (stage := run.committed(StageName("promotion", number))) is not None
    ]
    found = [number for number, promoted in judged if promoted] or run.rounds("evaluate")
    if not found:
        raise ConfigError(f"{run.path} has no round that was evaluated; run jobs/run_cit.py first")
    return found[-1]


def open_bundle(run: RunReader, number: int | None = None) -> Bundle:
    """The bundle of a round. Settings come from the model folders and the stages' records, never from `run.json`, which
    every later job overwrites.

    Args:
        number: the round; None = `best_round`.

    Raises:
        ConfigError: the round has no index, or the index was built from other models than the committed ones.
        CheckpointError: a model folder has no valid settings; the message names the stage to run again.
    """
    number = best_round(run) if number is None else number
    index = _needed(run, StageName("index", number), number)
    encoder = _needed(run, StageName("agcl", number), number)
    generator = _needed(run, StageName("rar", number), number)
    attributes = _needed(run, StageName("attributes", number + 1), number)
    built_from = index.inputs["upstream"]
    for stage in (encoder, attributes):
        if built_from.get(stage.name) != stage.fingerprint:
            raise ConfigError(
                f"{run.path}: the index of round {number} was built from another {stage.name}; "
                f"build it again: jobs/build_index.py --round {number}"
            )
    fingerprints = {
        "encoder": encoder.fingerprint,
        "generator": generator.fingerprint,
        "attributes": attributes.fingerprint,
        "index": index.fingerprint,
    }
    return Bundle(
        run=run.path,
        round=number,
        key=f"r{number}-{storage.digest(fingerprints)[:12]}",
        encoder_path=encoder.output("model"),
        encoder=EncoderSettings.read(encoder.output("model")),
        generator_path=generator.output("model"),
        generator=GeneratorSettings.read(generator.output("model")),
        index_path=index.directory,
        index=_index_settings(run, index, number),
        fingerprints=fingerprints,
        dimensions=index.metrics["dimensions"],
        metrics={"primary_protocol": _primary_metrics(run, number), "index": index.metrics},
    )


def _index_settings(run: RunReader, stage: Stage, number: int) -> IndexConfig:
    try:
        return validate_as(IndexConfig, stage.settings("index"))
    except ConfigError as error:
        raise ConfigError(
            f"{run.path}: stage {stage.name} records no valid settings of the index ({error}); "
            f"build it again: jobs/build_index.py --round {number}"
        ) from error


def _primary_metrics(run: RunReader, number: int) -> dict[str, Any]:
    """Name and mean metrics of the protocol that was primary in a round's evaluation; empty without an evaluation."""
    evaluated = run.committed(StageName("evaluate", number))
    settings = evaluated.settings("evaluation") if evaluated is not None else None
    if evaluated is None or settings is None:
        return {}
    name = settings["primary_protocol"]
    metrics = evaluated.metrics["protocols"][name]["metrics"]
    return {"protocol": name, **{metric: value["mean"] for metric, value in metrics.items()}}


def _needed(run: RunReader, name: StageName, number: int) -> Stage:
    stage = run.committed(name)
    if stage is None:
        rounds = run.rounds("index")
        available = f"; rounds with an index: {', '.join(map(str, rounds))}" if rounds else ""
        raise ConfigError(
            f"{run.path}: round {number} cannot be served, stage {name} is not committed{available}. "
            f"Run jobs/build_index.py --round {number} with the run's config"
        )
    return stage
