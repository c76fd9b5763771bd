"""The files of cluster/ as data, and what checks them."""

import functools
import json
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

from tests.cluster.kuberay_schema import SCHEMAS
from tests.shared import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
KUBERNETES_VERSION = "1.37.0"


def documents(name: str) -> list[dict[str, Any]]:
    """The objects of a manifest in cluster/kuberay/."""
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def only(objects: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """The one object of that kind (and name)."""
    (found,) = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    return found


@functools.cache
def _registry() -> Registry:
    return Resource.from_contents(_shipped("_definitions.json")) @ Registry()


def _shipped(name: str) -> Any:
    pytest.importorskip("kubernetes_validate")
    return json.loads((files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES_VERSION}-local-strict" / name).read_text())


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError unless the API server would take it: unknown fields are errors."""
    group, _, version = document["apiVersion"].rpartition("/")
    schema = SCHEMAS[document["kind"]] if group == "ray.io" else _shipped(f"{document['kind'].lower()}-{(group.split('.')[0] + '-') if group else ''}{version}.json")
    jsonschema.Draft202012Validator(schema, registry=_registry()).validate(document)


def pod_specs(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Role -> pod spec, of every pod that an object brings about."""
    spec = document.get("spec", {})
    if document["kind"] == "RayJob":
        submitter = {"submitter": spec["submitterPodTemplate"]["spec"]}
        return submitter | pod_specs({"kind": "RayCluster", "spec": spec["rayClusterSpec"]})
    if document["kind"] == "RayCluster":
        head = {"head": spec["headGroupSpec"]["template"]["spec"]}
        return head | {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {document["metadata"]["name"]: spec["template"]["spec"]} if "template" in spec else {}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that run and those that run before."""
    return [*pod["containers"], *pod.get("initContainers", [])]
