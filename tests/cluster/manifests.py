"""Kubernetes manifests as the API server would see them: overlays applied, schemas closed so that a typo fails."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared" / "reference" / "kuberay-crds"


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def overlay(name: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k overlays/NAME` would send: resources of the base, patches and images of the overlay."""
    folder = CLUSTER / "kuberay" / "overlays" / name
    (settings,) = documents(folder / "kustomization.yaml")
    found: list[dict[str, Any]] = []
    for base in settings["resources"]:
        (kustomization,) = documents(folder / base / "kustomization.yaml")
        for resource in kustomization["resources"]:
            found += documents(folder / base / resource)
        for document in found:
            document["metadata"].setdefault("namespace", kustomization["namespace"])
    for patch in settings.get("patches", []):
        target = [d for d in found if {"kind": d["kind"], "name": d["metadata"]["name"]} == patch["target"]]
        assert len(target) == 1, f"{patch['path']} patches {len(target)} documents"
        for operation in yaml.safe_load((folder / patch["path"]).read_text()):
            apply(target[0], operation)
    for image in settings.get("images", []):
        for container in containers(found):
            name_, _, tag = container["image"].rpartition(":")
            if name_ == image["name"]:
                container["image"] = f"{image.get('newName', name_)}:{image.get('newTag', tag)}"
    return found


def apply(document: Any, operation: dict[str, Any]) -> None:
    """One operation of a JSON patch (RFC 6902); `replace` and `remove` of what is not there fail."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place = document
    for part in way:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if operation["op"] == "add":
        place[last] = copy.deepcopy(operation["value"])
    elif operation["op"] == "replace":
        assert last in place, operation["path"]
        place[last] = copy.deepcopy(operation["value"])
    else:
        del place[last]


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container of a manifest."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "containers":
                yield from inner
            else:
                yield from containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)


def cluster_specs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The RayCluster specs in a document."""
    spec = document["spec"]
    if document["kind"] == "RayCluster":
        yield spec
    for name in ("rayClusterSpec", "rayClusterConfig"):
        if name in spec:
            yield spec[name]


def schema_of(kind: str) -> dict[str, Any]:
    found = json.loads((SCHEMAS / f"{kind.lower()}s-v1.schema.json").read_text())
    return closed(found["properties"]["spec"])


def closed(node: Any, strict: bool = True) -> Any:
    """A CRD's schema as a JSON schema that refuses unknown fields; parts repeated under `anyOf` stay open."""
    if isinstance(node, list):
        return [closed(one, strict) for one in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key.startswith("x-kubernetes-") or key in ("description", "default", "format"):
            continue
        if key == "properties":
            found[key] = {name: closed(inner, strict) for name, inner in value.items()}
        elif key in ("anyOf", "allOf", "oneOf"):
            found[key] = closed(value, strict=False)
        else:
            found[key] = closed(value, strict) if key in ("items", "additionalProperties") else value
    # The API server fills defaults in before it validates.
    if "required" in found:
        inner = node.get("properties", {})
        found["required"] = [name for name in found["required"] if "default" not in inner.get(name, {})]
    opened = node.get("x-kubernetes-preserve-unknown-fields")
    if strict and "properties" in found and "additionalProperties" not in found and not opened:
        found["additionalProperties"] = False
    return found
