"""`jobs/export.py` uses the settings that a model was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from afmrl_ray.commands.export import main
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig, ImageConfig
from afmrl_ray.models.model_settings import ModelSettings, encoder_settings, generator_settings

OTHER = ["encoder.instruction=Other.", "encoder.image.max_pixels=60000", "encoder.dtype=bfloat16"]
"""A config that the encoder was not trained with."""


@pytest.fixture
def trained(tiny_checkpoints: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Model folders as stages write them."""
    encoder = EncoderConfig(instruction="Look.", image=ImageConfig(max_pixels=50_000), max_tokens=99)
    settings: dict[str, Any] = {
        "encoder": encoder_settings(encoder, catalogue="c", upstream={"models": "m"}),
        "generator": generator_settings(GeneratorConfig(dtype="bfloat16"), catalogue="c", upstream={}),
    }
    folders = {role: str(tmp_path / "trained" / role) for role in settings}
    for role, folder in folders.items():
        shutil.copytree(tiny_checkpoints[role], folder)
        settings[role].write(folder)
    return folders


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_sentence_transformers_get_the_settings_of_the_training(trained, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["--sentence-transformers", "--model", trained["encoder"], "--out", str(out), *OTHER]) == 0
    assert capsys.readouterr().out.strip().endswith(str(out))
    prompts = json.loads((out / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "Look.", "document": "Look."}
    assert json.loads((out / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 50_000
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 99
    card = (out / "README.md").read_text()
    assert '"Look."' in card
    assert "Other." not in card
    assert ModelSettings.read(str(out)) == ModelSettings.read(trained["encoder"])


@pytest.mark.parametrize(("role", "dtype"), [("encoder", "float32"), ("generator", "bfloat16")])
def test_a_merged_checkpoint_has_the_dtype_and_settings_of_the_training(
    trained, tmp_path, role: str, dtype: str
) -> None:
    out = tmp_path / "out"
    assert main(["--role", role, "--model", trained[role], "--out", str(out), *OTHER]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert ModelSettings.read(str(out)) == ModelSettings.read(trained[role])


def test_a_model_of_another_role_or_kind_is_refused(trained, tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["--role", "encoder", "--model", trained["generator"], *out]) == 2
    assert last_error(capsys) == f"error: --role encoder: {trained['generator']} holds a model of role generator"
    assert main(["--sentence-transformers", "--model", trained["generator"], *out]) == 2
    assert last_error(capsys) == (
        f"error: --sentence-transformers: {trained['generator']} holds a model of kind qwen2_5_vl; "
        "name an encoder of kind qwen2_vl"
    )
    assert not (tmp_path / "out").exists()


def test_a_model_without_settings_is_refused_unless_the_config_is_named(
    tiny_checkpoints: dict[str, str], trained, tmp_path: Path, capsys
) -> None:
    out, plain = tmp_path / "out", tiny_checkpoints["encoder"]
    command = ["--sentence-transformers", "--out", str(out), *OTHER]
    assert main([*command, "--model", plain]) == 2
    assert "has no afmrl.json" in last_error(capsys)
    assert main([*command, "--model", plain, "--settings-from-config"]) == 2
    assert "--role is missing" in last_error(capsys)
    assert main([*command, "--model", trained["encoder"], "--settings-from-config", "--role", "encoder"]) == 2
    assert "leave the option out" in last_error(capsys)
    assert not out.exists()
    assert main([*command, "--model", plain, "--settings-from-config", "--role", "encoder"]) == 0
    assert '"Other."' in (out / "README.md").read_text()
