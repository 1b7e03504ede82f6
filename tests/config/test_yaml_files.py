"""Every YAML file of the repository loads; run and serving configs are validated, so an unknown key in one fails."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from afmrl_ray.config import load_config
from afmrl_ray.config.load import validate_as
from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
APPLICATION = "afmrl_ray.serving:app_builder"


def yaml_files() -> Iterator[Path]:
    """All YAML files outside folders that git ignores, relative to the repository."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()} | {".git"}
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if name not in ignored and not name.endswith(".egg-info")]
        yield from ((Path(folder) / name).relative_to(ROOT) for name in names if name.endswith((".yaml", ".yml")))


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all((ROOT / path).read_text()) if document is not None]


def serving_arguments(path: Path) -> list[dict[str, Any]]:
    """Arguments of the served application in a Serve config, or in the one inside a RayService manifest."""
    found = []
    for document in documents(path):
        if isinstance(document, dict):
            config = yaml.safe_load(document.get("spec", {}).get("serveConfigV2", "")) or document
            applications = config.get("applications", [])
            found += [each["args"] for each in applications if each.get("import_path") == APPLICATION]
    return found


FILES = sorted(yaml_files())
RUN_CONFIGS = [path for path in FILES if path.parent.name == "configs"]
SERVING_CONFIGS = [path for path in FILES if serving_arguments(path)]


def test_run_and_serving_configs_are_found() -> None:
    assert {Path("jobs/configs/demo.yaml"), Path("cluster/configs/cit.yaml")} <= set(RUN_CONFIGS)
    assert {Path("cluster/serve.yaml"), Path("cluster/kuberay/rayservice.yaml")} <= set(SERVING_CONFIGS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_is_valid_yaml_with_content(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=str)
def test_every_run_config_is_valid(path: Path) -> None:
    load_config(str(ROOT / path))


@pytest.mark.parametrize("path", SERVING_CONFIGS, ids=str)
def test_every_serving_config_is_valid(path: Path) -> None:
    for arguments in serving_arguments(path):
        validate_as(ServingConfig, arguments)


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=str)
def test_an_unknown_key_in_any_section_of_a_run_config_is_an_error(path: Path, tmp_path: Path) -> None:
    (values,) = documents(path)
    for section in ("", *values):
        changed = copy.deepcopy(values)
        (changed[section] if section else changed)["unknown_key"] = 1
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(ConfigError, match=r"unknown config key '(\w+\.)?unknown_key'"):
            load_config(str(tmp_path / "changed.yaml"))


@pytest.mark.parametrize("path", SERVING_CONFIGS, ids=str)
def test_an_unknown_key_in_a_serving_config_is_an_error(path: Path) -> None:
    for arguments in serving_arguments(path):
        with pytest.raises(ConfigError, match="unknown config key 'unknown_key'"):
            validate_as(ServingConfig, {**arguments, "unknown_key": 1})
