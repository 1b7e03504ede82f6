"""Write a trained encoder or generator as one ordinary checkpoint, adapters merged into their base.

The settings are those that the model was trained with, from `afmrl.json` in its folder; the config decides nothing
about a model that a stage of a run wrote.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.export import export_merged
from afmrl_ray.models.model_settings import (
    EncoderSettings,
    ModelSettings,
    encoder_settings,
    generator_settings,
    has_settings,
)
from afmrl_ray.models.sentence_transformers_export import export_sentence_transformers


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder, URI or hub name, e.g. runs/demo/stages/agcl-r1/*/model")
    parser.add_argument("--role", choices=("encoder", "generator"), help="which of the two models it must be")
    parser.add_argument("--out", required=True, help="folder or URI to write, empty or new")
    parser.add_argument(
        "--sentence-transformers", action="store_true", help="write an encoder for sentence-transformers"
    )
    parser.add_argument(
        "--settings-from-config",
        action="store_true",
        help="take the settings from the config section of --role, for a checkpoint that no stage of a run wrote",
    )


def body(config: Config, options: argparse.Namespace) -> None:
    settings = settings_of(config, options)
    if not options.sentence_transformers:
        export_merged(options.model, options.out, settings)
    elif isinstance(settings, EncoderSettings):
        export_sentence_transformers(options.model, options.out, settings)
    else:
        raise ConfigError(
            f"--sentence-transformers: {options.model} holds a model of kind {settings.kind}; name an encoder of kind "
            "qwen2_vl"
        )
    print(options.out)


def settings_of(config: Config, options: argparse.Namespace) -> ModelSettings:
    """Settings of the model that is exported.

    Raises:
        CheckpointError: the model has no settings, and they are not to be taken from the config.
        ConfigError: it has settings, and they are to be taken from the config; or it has another role.
    """
    if options.settings_from_config:
        if options.role is None:
            raise ConfigError("--settings-from-config: --role is missing; it names the config section")
        if has_settings(options.model):
            raise ConfigError(
                f"--settings-from-config: {options.model} has the settings that it was trained with; "
                "leave the option out"
            )
        if options.role == "encoder":
            return encoder_settings(config.encoder, catalogue=None, upstream={})
        return generator_settings(config.generator, catalogue=None, upstream={})
    settings = ModelSettings.read(options.model)
    if options.role not in (None, settings.role):
        raise ConfigError(f"--role {options.role}: {options.model} holds a model of role {settings.role}")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)
