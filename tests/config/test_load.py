"""Loading and validation of the config."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from afmrl_ray.config import Config, dump_yaml, known_keys, load_config, validate
from afmrl_ray.config.cluster import PoolConfig
from afmrl_ray.config.teacher import ColumnTeacherConfig
from afmrl_ray.errors import ConfigError


def test_overrides_apply_after_the_file_and_in_order(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("rar: {group_size: 4, kl_coef: 0.5}\nrun: {name: one}\n")
    config = load_config(str(file), ["rar.group_size=16", "rar.group_size=32", "agcl.lexical.scale=self"])
    assert (config.rar.group_size, config.rar.kl_coef, config.run.name) == (32, 0.5, "one")
    assert config.agcl.lexical.scale == "self"


def test_a_printed_config_loads_as_the_same_config(tmp_path):
    config = load_config(None, ["evaluation.primary_protocol=x", "evaluation.protocols=[{kind: retrieval, name: x}]"])
    file = tmp_path / "printed.yaml"
    file.write_text(dump_yaml(config))
    assert load_config(str(file)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["[=1"], r"'\[=1' is not an override; write section.field=value"),
        (["rar.grp_size=3"], "unknown config key 'rar.grp_size'; the nearest known key is 'rar.group_size'"),
        (["agcl.lexical.scal=raw"], "nearest known key is 'agcl.lexical.scale'"),
        (["rar.group_size=many"], "rar.group_size: .*integer.*'many'"),
        (["rar.group_size=1"], "rar.group_size: .*greater than or equal to 2"),
        (["agcl.temperature=nan"], "agcl.temperature"),
        (["agcl.batch_size=7", "agcl.workers.num_workers=2"], "agcl.batch_size 7 does not divide.*use a multiple"),
        (
            ["agcl.workers={num_workers: 2, min_workers: 3}"],
            "agcl.workers: min_workers 3 is above num_workers 2; lower",
        ),
        (
            ["agcl.workers={num_workers: 2, min_workers: 1, zero_stage: 2}"],
            "agcl.workers: min_workers .*zero_stage 2.*set zero_stage=0 or leave min_workers out",
        ),
        (
            ["distill.batch_size=32", "distill.workers={num_workers: 4, min_workers: 2}"],
            "distill.batch_size 32 does not divide among 3 workers.*min_workers 2 allows; use a multiple of 12",
        ),
        (["rar.prompts_per_step=3", "rar.num_learners=2"], "prompts_per_step 3 does not divide"),
        (["evaluation.primary_protocol=nothing"], "evaluation.primary_protocol 'nothing' is not a retrieval protocol"),
        (
            ["evaluation.protocols=[{kind: retrieval, name: fine, ks: [5]}]"],
            "evaluation.protocols: ks of 'fine' lacks 1, but evaluation.primary_protocol names it",
        ),
        (
            [
                "evaluation.protocols=[{kind: retrieval, name: fine},{kind: retrieval, name: b, ks: [5]}]",
                "cit.gate.protocols=[fine,b]",
            ],
            "evaluation.protocols: ks of 'b' lacks 1, but cit.gate.protocols names it",
        ),
        (
            [
                "evaluation.protocols=[{kind: retrieval, name: fine},{kind: retrieval, name: b, ks: [5]}]",
                "cit.selection_protocol=b",
            ],
            "evaluation.protocols: ks of 'b' lacks 1, but cit.selection_protocol names it",
        ),
        (
            ["cit.selection_protocol=labels"],
            "cit.selection_protocol 'labels' is not a retrieval protocol; retrieval protocols: fine",
        ),
        (["teacher.kind=oracle"], "teacher.*'column', 'openai', 'model'"),
        (
            ["encoder.vision_cache.enabled=true", "agcl.adapter.kind=full", "agcl.adapter.train_vision=true"],
            "train_vision trains it; set one of them to false",
        ),
        (["encoder.vision_cache.enabled=true", "agcl.workers.zero_stage=3"], "use zero_stage 2 or less"),
        (["justtext"], "write section.field=value"),
    ],
)
def test_an_invalid_value_gives_one_line_that_names_the_field(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, overrides)
    assert "\n" not in str(caught.value)


def test_protocols_without_a_decision_may_have_any_depths():
    protocols = "{kind: retrieval, name: fine},{kind: retrieval, name: deep, ks: [5]},{kind: labels, name: x}"
    config = load_config(
        None, [f"evaluation.protocols=[{protocols}]", "cit.gate.protocols=[x]", "cit.selection_protocol=fine"]
    )
    assert config.evaluation.protocols[1].ks == (5,)


def test_the_error_names_a_missing_or_malformed_file(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such config file"):
        load_config(str(tmp_path / "nowhere.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("rar: {group_size: 4\n  - x")
    with pytest.raises(ConfigError, match=r"broken.yaml: "):
        load_config(str(broken))


def test_every_field_has_a_description():
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


def test_fields_that_an_override_does_not_set_keep_their_defaults():
    default = Config()
    config = load_config(None, ["rar.task.query.inputs=image", "rar.rollout.pool.num_workers=3", "teacher.names=[a]"])
    assert config.rar.task.query == default.rar.task.query.model_copy(update={"inputs": "image"})
    assert config.rar.rollout.pool.batch_size == default.rar.rollout.pool.batch_size != PoolConfig().batch_size
    assert config.teacher == ColumnTeacherConfig(names=("a",))
    assert load_config(None, ["distill.optimizer.schedule=constant"]).distill.optimizer.learning_rate == 1e-5
    pair = load_config(None, ["agcl.pairs=[{query: {inputs: image}}]"]).agcl.pairs[0]
    assert pair.query.split == pair.positive.split == ("train",)
    assert (
        load_config(None, ["evaluation.protocols=[{name: fine, kind: retrieval, query: {role: null}}]"])
        .evaluation.protocols[0]
        .query.role
        is None
    )


@given(st.sampled_from([key for key in known_keys(Config) if "." in key]))
@settings(max_examples=60, deadline=None)
def test_setting_a_field_to_its_default_changes_nothing(key):
    value = Config().model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return  # inside a list, or a field of another kind of teacher
        value = value[part]
    if isinstance(value, dict | list):
        return
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert validate(tree) == Config()


# Keys inside lists cannot be written as dotted overrides, and `kind` decides which keys a teacher has.
DOTTED = [key for key in known_keys(Config) if "." in key and ".pairs." not in key and ".protocols." not in key]
LONG = [key for key in DOTTED if len(key.rsplit(".", 1)[1]) > 5 and not key.startswith("teacher.")]


@given(st.sampled_from(LONG), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_error_for_a_misspelt_key_names_the_nearest_key(key, position):
    section, field = key.rsplit(".", 1)
    wrong = f"{section}.{field[:position]}{field[position + 1 :]}"  # one letter is missing
    with pytest.raises(ConfigError, match=rf"unknown config key '{re.escape(wrong)}'.*'{re.escape(key)}'$"):
        load_config(None, [f"{wrong}=1"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"evaluation": {"protocols": [{"kind": "retrieval", "name": "fine", "galery": {}}]}},
            "unknown config key 'evaluation.protocols.galery'; the nearest known key is 'evaluation.protocols.gallery'",
        ),
        (
            {"teacher": {"kind": "openai", "base_url": "x", "model": "m", "concurency": 1}},
            "unknown config key 'teacher.concurency'; the nearest known key is 'teacher.concurrency'",
        ),
        ({"teacher": {"kind": "openai", "base_url": "x", "model": [1]}}, r"teacher.model: .*string"),
        ({"evaluation": {"protocols": [{"kind": "retrieval", "name": "fine", "ks": []}]}}, "evaluation.protocols.ks"),
        ({"evaluation": {"protocols": [{"kind": "retrieval", "name": "fine", "ks": [0]}]}}, "evaluation.protocols.ks"),
        ({"evaluation": {"protocols": [{"kind": "retrieval", "name": "fine"}] * 2}}, "'fine' names two protocols"),
        ({"distill": {"adapter": {"kind": "lora"}}}, "set both to the same kind"),
        ({"tiny": {"hidden_size": 100, "num_heads": 3}}, "hidden_size 100 does not divide among num_heads 3"),
    ],
)
def test_errors_inside_lists_name_the_field(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(values)


@pytest.mark.parametrize("content", [b"3", b"- a\n- b", b"a: \xff", b"a: ["])
def test_a_file_that_is_not_a_mapping_is_a_config_error(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(str(tmp_path / "c.yaml"))


def test_config_imports_neither_torch_nor_ray():
    code = "import sys, afmrl_ray.config; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_scalars_are_text_where_the_field_is_text(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "run: {name: 007}\n"
        "rar: {task: {query: {where: {in_stock: true, brand: 12}}}}\n"
        "evaluation: {primary_protocol: 1e5, protocols: [{kind: retrieval, name: 1e5}]}\n"
    )
    config = load_config(str(tmp_path / "a.yaml"), ["encoder.instruction=on", "run.seed=7"])
    assert (config.run.name, config.run.seed, config.encoder.instruction) == ("007", 7, "on")
    assert config.rar.task.query.where == {"in_stock": "true", "brand": "12"}
    assert config.evaluation.protocols[0].name == config.evaluation.primary_protocol == "1e5"
    assert load_config(None, ["run.name=1234567"]).run.name == "1234567"
    assert validate({"run": {"name": 7}}).run.name == "7"
    with pytest.raises(ConfigError, match=r"run\.name: .* valid string"):
        validate({"run": {"name": [7]}})


@pytest.mark.parametrize("path", ["/data/a #b.parquet", "/data/a#b", "C: #", "/data/'a' #1"])
def test_an_override_is_taken_whole(path):
    assert load_config(None, [f"catalogue.path={path}"]).catalogue.path == path


def test_a_pattern_that_is_none_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"targets '\.\*\(q_proj' is no regular expression"):
        load_config(None, ["agcl.adapter.targets='.*(q_proj'"])
