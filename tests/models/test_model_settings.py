"""A model folder carries the settings that its model was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from afmrl_ray.config.models import EncoderConfig, GeneratorConfig, ImageConfig
from afmrl_ray.errors import CheckpointError
from afmrl_ray.models.model_settings import (
    DualEncoderSettings,
    EncoderSettings,
    GeneratorSettings,
    ModelSettings,
    encoder_settings,
    generator_settings,
)

ENCODER = EncoderConfig(
    image=ImageConfig(min_pixels=784, max_pixels=7840), dtype="bfloat16", instruction="Describe.", max_tokens=77
)
GENERATOR = GeneratorConfig(
    image=ImageConfig(min_pixels=784, max_pixels=7840),
    dtype="bfloat16",
    inputs="image",
    title_columns=("brand", "title"),
    instruction="Name the attributes.",
    max_prompt_tokens=99,
    max_new_tokens=33,
    max_attributes=5,
    unique_names=False,
)
NOT_RECORDED = {"path", "vision_cache", "dual_encoder"}
"""Where the base comes from, a cache that changes no result, and objectives of a training."""


def settings(role: str) -> ModelSettings:
    made_from: dict[str, Any] = {"catalogue": "c1", "upstream": {"labels": "f1", "models": "f2"}}
    return encoder_settings(ENCODER, **made_from) if role == "encoder" else generator_settings(GENERATOR, **made_from)


@pytest.mark.parametrize(("config", "role"), [(ENCODER, "encoder"), (GENERATOR, "generator")])
def test_the_config_that_is_read_back_equals_that_of_the_training(tmp_path: Path, config, role: str) -> None:
    defaults = type(config)()
    recorded = type(config).model_fields.keys() - NOT_RECORDED - {"kind"}
    assert all(getattr(config, name) != getattr(defaults, name) for name in recorded), "every field is tried"
    settings(role).write(str(tmp_path))
    found = ModelSettings.read(str(tmp_path))
    assert isinstance(found, EncoderSettings | GeneratorSettings)
    assert found.config() == config
    assert (found.role, found.catalogue, found.upstream) == (role, "c1", {"labels": "f1", "models": "f2"})


def test_settings_survive_a_move_of_the_folder(tmp_path: Path) -> None:
    settings("encoder").write(str(tmp_path / "run/model"))
    shutil.move(tmp_path / "run/model", tmp_path / "elsewhere")
    assert EncoderSettings.read(str(tmp_path / "elsewhere")).config() == ENCODER


def test_the_base_is_the_one_that_the_adapter_names(tmp_path: Path) -> None:
    settings("encoder").write(str(tmp_path / "whole"))
    assert EncoderSettings.read(str(tmp_path / "whole")).base is None
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/base"}))
    settings("encoder").write(str(tmp_path / "adapter"))
    assert EncoderSettings.read(str(tmp_path / "adapter")).base == "/base"


def test_a_dual_encoder_records_no_prompt(tmp_path: Path) -> None:
    config = EncoderConfig(kind="dual_encoder", dtype="bfloat16")
    encoder_settings(config, catalogue="c", upstream={}).write(str(tmp_path))
    found = DualEncoderSettings.read(str(tmp_path))
    assert (found.checkpoint_role, found.dtype) == ("dual_encoder", "bfloat16")
    with pytest.raises(CheckpointError, match="kind dual_encoder, where qwen2_vl is needed"):
        EncoderSettings.read(str(tmp_path))


def test_a_model_of_an_old_run_names_the_stage_to_run_again(tmp_path: Path) -> None:
    folder = f"{tmp_path}/demo/stages/agcl-r1/0f3a/model"
    with pytest.raises(CheckpointError) as error:
        EncoderSettings.read(folder)
    assert str(error.value) == (
        f"{folder} has no afmrl.json, the settings that a model was trained with; run stage agcl-r1 again: remove "
        f"{tmp_path}/demo/stages/agcl-r1 and run jobs/run_cit.py with the run's config"
    )
    with pytest.raises(CheckpointError, match="train the model again with this version"):
        EncoderSettings.read(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: "[1]", "is damaged"),
        (lambda text: json.dumps({**json.loads(text), "dtype": "int8"}), r"is damaged \(qwen2_vl.dtype: "),
        (lambda text: json.dumps({**json.loads(text), "unknown": 1}), r"is damaged \(qwen2_vl.unknown: "),
        (lambda text: json.dumps({**json.loads(text), "schema_version": 2}), "has schema version 2"),
        *(
            (lambda text, name=name: json.dumps({k: v for k, v in json.loads(text).items() if k != name}), "is damaged")
            for name in EncoderSettings.model_fields.keys() - {"role"}
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change, says: str) -> None:
    settings("encoder").write(str(tmp_path))
    file = tmp_path / "afmrl.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(CheckpointError, match=says) as error:
        ModelSettings.read(str(tmp_path))
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_generator_from_before_unique_names_is_used_as_it_was(tmp_path: Path) -> None:
    generator_settings(GeneratorConfig(), catalogue=None, upstream={}).write(str(tmp_path))
    path = tmp_path / "afmrl.json"
    values = json.loads(path.read_text())
    assert values.pop("unique_names") is True
    path.write_text(json.dumps(values))
    assert not GeneratorSettings.read(str(tmp_path)).config().unique_names
