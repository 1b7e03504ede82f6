"""KubeRay manifests against the published schemas, against each other and against what the code asks for."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest
import yaml

from afmrl_ray.config import load_config
from afmrl_ray.config.base import Section
from afmrl_ray.config.cluster import PlacementConfig
from tests.cluster.manifests import CLUSTER, SCHEMAS, cluster_specs, containers, documents, overlay, schema_of

FILES = ("rayjob-cit.yaml", "rayjob-cit-kueue.yaml", "rayservice.yaml")
OVERLAYS = ("gpu", "cpu-kind")


def ours() -> dict[str, list[dict[str, Any]]]:
    """Documents of KubeRay's kinds and the others, by where they come from."""
    found = {f"overlays/{name}": overlay(name) for name in OVERLAYS}
    return {**found, **{name: documents(CLUSTER / "kuberay" / name) for name in FILES}}


def ray_documents() -> list[Any]:
    return [
        pytest.param(document, id=f"{source}-{document['kind']}")
        for source, found in ours().items()
        for document in found
        if document["apiVersion"] == "ray.io/v1"
    ]


@pytest.mark.skipif(not SCHEMAS.exists(), reason=f"KubeRay's CRD schemas are not at {SCHEMAS}")
@pytest.mark.parametrize("document", ray_documents())
def test_manifests_meet_the_published_schema(document: dict[str, Any]) -> None:
    from jsonschema import Draft202012Validator

    faults = [
        f"{'/'.join(map(str, fault.absolute_path))}: {fault.message}"
        for fault in Draft202012Validator(schema_of(document["kind"])).iter_errors(document["spec"])
    ]
    assert faults == []


@pytest.mark.skipif(not SCHEMAS.exists(), reason=f"KubeRay's CRD schemas are not at {SCHEMAS}")
def test_the_schema_catches_a_typo() -> None:
    from jsonschema import Draft202012Validator

    (document,) = (d for d in overlay("gpu") if d["kind"] == "RayCluster")
    document["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert not Draft202012Validator(schema_of("RayCluster")).is_valid(document["spec"])


@pytest.mark.parametrize("document", ray_documents())
def test_every_pod_is_what_ray_and_the_cluster_expect(document: dict[str, Any]) -> None:
    for spec in cluster_specs(document):
        assert spec["rayVersion"] == metadata.version("ray")
        assert spec["authOptions"]["mode"] == "token"
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        groups = spec["workerGroupSpecs"]
        assert len({group["groupName"] for group in groups}) == len(groups)
        for group in [spec["headGroupSpec"], *groups]:
            pod = group["template"]["spec"]
            assert group["template"]["metadata"]["labels"] == {"app.kubernetes.io/part-of": "afmrl"}
            assert pod["securityContext"]["runAsNonRoot"]
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            (container,) = pod["containers"]
            assert f"ray{spec['rayVersion']}" in container["image"].rpartition(":")[2]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"name": "metrics", "containerPort": 8080} in container["ports"]
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert mounts == set(volumes)
            memory = _gib(container["resources"]["limits"]["memory"])
            # Ray takes 30 % of the memory for its object store, and it must fit into /dev/shm.
            assert _gib(volumes["shm"]["emptyDir"]["sizeLimit"]) <= memory / 2
        for group in groups:
            assert group["labels"]["afmrl/role"] == group["groupName"]
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_names_that_manifests_use_are_there() -> None:
    secrets = {d["metadata"]["name"] for d in documents(CLUSTER / "kuberay" / "secrets.example.yaml")}
    claims = {d["metadata"]["name"] for d in overlay("gpu") if d["kind"] == "PersistentVolumeClaim"}
    used_secrets, used_claims = set(), set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key in ("secretRef", "secretKeyRef"):
                    used_secrets.add(inner["name"])
                elif key == "secretName":
                    used_secrets.add(inner)
                elif key == "claimName":
                    used_claims.add(inner)
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(list(ours().values()))
    assert used_secrets == secrets
    assert used_claims == claims
    (job,) = documents(CLUSTER / "kuberay" / "rayjob-cit.yaml")
    clusters = {d["metadata"]["name"] for d in overlay("gpu") if d["kind"] == "RayCluster"}
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] in clusters


def test_one_image_for_each_kind_of_machine() -> None:
    images = {container["image"].rpartition(":")[2] for found in ours().values() for container in containers(found)}
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert images == {"0.1.0-ray2.60.0-cpu", "0.1.0-ray2.60.0-gpu"}
    assert all(f"afmrl-ray:{tag}" in dockerfile for tag in images)
    assert f"ARG RAY_VERSION={metadata.version('ray')}" in dockerfile
    assert metadata.version("afmrl_ray") == "0.1.0"


def test_the_jobs_run_what_the_image_has() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    for name in ("rayjob-cit.yaml", "rayjob-cit-kueue.yaml"):
        (job,) = documents(CLUSTER / "kuberay" / name)
        words = job["spec"]["entrypoint"].split()
        home = "/home/ray/afmrl_ray/"
        for word in words:
            if word.startswith(home):
                assert (CLUSTER.parent / word.removeprefix(home)).is_file()
        overrides = words[words.index("--config") + 2 :]
        load_config(str(CLUSTER / "configs" / "cit.yaml"), overrides)
        assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_ENABLE_AUTO_CONNECT"] == "0"
    assert "COPY --chown=ray:users cluster/configs ./cluster/configs" in dockerfile


def placements(section: Any) -> list[PlacementConfig]:
    if isinstance(section, PlacementConfig):
        return [section]
    if not isinstance(section, Section):
        return []
    return [found for name in type(section).model_fields for found in placements(getattr(section, name))]


def test_labels_that_the_config_names_are_those_of_the_groups() -> None:
    config = load_config(str(CLUSTER / "configs" / "cit.yaml"), ["catalogue.path=s3://bucket/products.parquet"])
    asked = {role for placement in placements(config) for role in placement.labels.values()}
    for source in ("overlays/gpu", "rayjob-cit-kueue.yaml"):
        groups = {
            group["labels"]["afmrl/role"]
            for document in ours()[source]
            if document["apiVersion"] == "ray.io/v1"
            for spec in cluster_specs(document)
            for group in spec["workerGroupSpecs"]
        }
        assert asked <= groups
    assert asked == {"train", "rollout", "reward"}


def test_policies_let_in_who_must_come_in() -> None:
    policies = {d["metadata"]["name"]: d for d in overlay("gpu") if d["kind"] == "NetworkPolicy"}
    open_ports = {
        port["port"]
        for policy in policies.values()
        for rule in policy["spec"]["ingress"]
        for port in rule.get("ports", [])
    }
    assert open_ports == {8265, 8000, 8080}
    for policy in policies.values():
        assert policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/part-of"] == "afmrl"


def _gib(amount: str) -> float:
    assert amount.endswith("Gi")
    return float(amount.removesuffix("Gi"))
