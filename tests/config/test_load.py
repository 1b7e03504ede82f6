from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from afmrl_ray.config import Config, dump_yaml, known_keys, load_config
from afmrl_ray.errors import ConfigError


def test_file_then_overrides_in_order(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("rar: {group_size: 4, kl_coef: 0.5}\nrun: {name: one}\n")
    config = load_config(str(file), ["rar.group_size=16", "rar.group_size=32", "agcl.lexical.scale=self"])
    assert (config.rar.group_size, config.rar.kl_coef, config.run.name) == (32, 0.5, "one")
    assert config.agcl.lexical.scale == "self"


def test_the_printed_config_reads_back_as_itself(tmp_path):
    config = load_config(None, ["evaluation.headline=x", "evaluation.protocols=[{kind: retrieval, name: x}]"])
    file = tmp_path / "printed.yaml"
    file.write_text(dump_yaml(config))
    assert load_config(str(file)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rar.grp_size=3"], "unknown config key 'rar.grp_size'; the nearest known key is 'rar.group_size'"),
        (["agcl.lexical.scal=raw"], "nearest known key is 'agcl.lexical.scale'"),
        (["rar.group_size=many"], "rar.group_size: .*integer.*'many'"),
        (["rar.group_size=1"], "rar.group_size: .*greater than or equal to 2"),
        (["agcl.temperature=nan"], "agcl.temperature"),
        (["agcl.batch_size=7", "agcl.workers.num_workers=2"], "agcl.batch_size 7 does not divide.*use a multiple"),
        (["rar.prompts_per_step=3", "rar.num_learners=2"], "prompts_per_step 3 does not divide"),
        (["evaluation.headline=nothing"], "evaluation.headline 'nothing' is not a retrieval protocol"),
        (["teacher.kind=oracle"], "teacher.*'column', 'openai', 'model'"),
        (["justtext"], "write section.field=value"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such config file"):
        load_config(str(tmp_path / "nowhere.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("rar: {group_size: 4\n  - x")
    with pytest.raises(ConfigError, match=r"broken.yaml: "):
        load_config(str(broken))


def test_every_field_has_a_sentence():
    def sections(annotation: object) -> list[type[BaseModel]]:
        inner = [found for part in get_args(annotation) for found in sections(part)]
        own = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
        return own + inner

    def visit(model: type[BaseModel], prefix: str) -> list[str]:
        missing = [prefix + name for name, field in model.model_fields.items() if not field.description]
        for name, field in model.model_fields.items():
            for section in sections(field.annotation):
                missing += visit(section, f"{prefix}{name}.")
        return missing

    assert visit(Config, "") == []


@given(st.sampled_from([key for key in known_keys(Config) if "." in key]), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_misspelt_key_is_told_its_neighbour(key, position):
    section, field = key.rsplit(".", 1)
    wrong = f"{section}.{field[: position + 1]}zz{field[position + 1 :]}"
    with pytest.raises(ConfigError, match=rf"unknown config key|{section.split('.')[0]}"):
        load_config(None, [f"{wrong}=1"])


def test_config_imports_neither_torch_nor_ray():
    code = "import sys, afmrl_ray.config; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
