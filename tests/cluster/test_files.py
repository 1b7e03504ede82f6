"""The other files of `cluster/`: Serve's, `ray up`'s, monitoring, the image, scripts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from afmrl_ray.config.rar import RewardConfig
from afmrl_ray.config.serving import ServingConfig
from tests.cluster.manifests import CLUSTER, ROOT, documents


def test_the_serve_file_is_what_serve_and_the_application_take() -> None:
    from ray.serve.schema import ServeDeploySchema

    (given,) = documents(CLUSTER / "serve.yaml")
    schema = ServeDeploySchema.model_validate(given)
    (application,) = schema.applications
    assert application.import_path == "afmrl_ray.serving:app_builder"
    ServingConfig.model_validate(application.args)
    assert {deployment.name for deployment in application.deployments} <= {"Ingress", "Encoder", "Generator", "Index"}
    (service,) = documents(CLUSTER / "kuberay" / "rayservice.yaml")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == given


@pytest.mark.parametrize("name", ["aws", "onprem"])
def test_ray_up_files_pass_rays_own_checks(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (given,) = documents(CLUSTER / "ray-up" / f"{name}.yaml")
    prepared = prepare_config(given)
    validate_config(prepared)
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**given, "max_worker": 1}))


def test_aws_groups_have_the_labels_that_the_config_names() -> None:
    (given,) = documents(CLUSTER / "ray-up" / "aws.yaml")
    roles = {kind["labels"]["afmrl/role"] for kind in given["available_node_types"].values() if "labels" in kind}
    assert roles == {"data", "train", "rollout", "reward"}
    assert given["available_node_types"]["head"]["resources"] == {"CPU": 0}


def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """Names under which Prometheus finds what the code exports through Ray."""
    import ray.util.metrics

    from afmrl_ray.rar.reward.client import RewardClient
    from afmrl_ray.rar.reward.metrics import Meter
    from afmrl_ray.serving.app import _ray_metrics
    from afmrl_ray.training.metrics_log import MetricsLog

    names: set[str] = set()
    began = ray.util.metrics.Metric.__init__

    def noted(self: Any, name: str, *arguments: Any, **more: Any) -> None:
        kind = type(self).__name__
        names.update({"Counter": [f"ray_{name}_total"], "Gauge": [f"ray_{name}"]}.get(kind, []))
        if kind == "Histogram":
            names.update(f"ray_{name}_{part}" for part in ("bucket", "sum", "count"))
        began(self, name, *arguments, **more)

    monkeypatch.setattr(ray.util.metrics.Metric, "__init__", noted)
    Meter("actor")
    RewardClient([], "version", RewardConfig()).close()
    _ray_metrics()
    MetricsLog(str(tmp_path), training="rar-r0").close()
    return names


def test_dashboards_and_rules_name_metrics_that_are_exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [(CLUSTER / "monitoring" / name).read_text() for name in ("grafana.json", "rules.yaml")]
    named = {name for text in texts for name in re.findall(r"\bray_afmrl_\w+", text)}
    assert len(named) > 10
    assert named <= exported(monkeypatch, tmp_path)
    source = "".join(path.read_text() for path in (ROOT / "afmrl_ray").rglob("*.py"))
    for metric in {name for text in texts for name in re.findall(r'ray_afmrl_training\{metric=\\?"([\w/]+)', text)}:
        assert f'"{metric}"' in source


def test_every_panel_has_a_query_and_a_place() -> None:
    board = json.loads((CLUSTER / "monitoring" / "grafana.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    titles = " ".join(panel["title"] for panel in board["panels"])
    for wanted in ("Reward", "length", "second", "Failed rewards", "queue depth", "GPU use"):
        assert wanted in titles
    assert all(panel["targets"] and all(target["expr"] for target in panel["targets"]) for panel in board["panels"])


def test_the_image_is_made_of_files_that_are_there() -> None:
    dockerfile, ignored = (CLUSTER / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY --chown=ray:users (.+) \S+$", dockerfile, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored
    assert dockerfile.count("USER ray") == 2
    assert ":latest" not in dockerfile
    assert dockerfile.count("--constraint constraints.txt") == 3


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_parses() -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm" / "cit.sbatch")], check=True)


def test_no_secret_is_in_a_file() -> None:
    for document in documents(CLUSTER / "kuberay" / "secrets.example.yaml"):
        assert set(document["stringData"].values()) == {""}
