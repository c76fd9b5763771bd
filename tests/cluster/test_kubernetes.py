"""The manifests of cluster/kuberay/, without kubectl: schemas, then what schemas cannot say."""

import copy
import json
import shlex

import jsonschema
import pytest

from rayjobs.cli import parse_job
from rayjobs.tune import TuneJob
from tests.cluster.manifests import CLUSTER, containers, documents, only, pod_specs, validate

MANIFESTS = ("network.yaml", "raycluster.yaml", "rayjob-tune.yaml", "mlflow.yaml")
ALL_PODS = [(f"{name}:{role}", pod) for name in MANIFESTS for d in documents(name) for role, pod in pod_specs(d).items()]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_is_what_the_api_server_takes(name):
    for document in documents(name):
        validate(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "cad"


@pytest.mark.parametrize(
    "path, value",
    [
        (("spec", "rayVerison"), "2.60.0"),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("spec", "autoscalerOptions", "resources", "limit"), {}),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "container"), []),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "envFrom", 0, "secret"), {}),
        (("spec", "workerGroupSpecs", 1, "maxReplicas"), "8"),
    ],
)
def test_mistake_in_a_raycluster_is_refused(path, value):
    document = copy.deepcopy(only(documents("raycluster.yaml"), "RayCluster"))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(document)


def test_rayjob_has_the_cluster_of_the_raycluster():
    cluster, job = only(documents("raycluster.yaml"), "RayCluster"), only(documents("rayjob-tune.yaml"), "RayJob")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["ttlSecondsAfterFinished"] > 0


def test_rayjob_entrypoint_is_a_command_of_this_program():
    program, script, *arguments = shlex.split(only(documents("rayjob-tune.yaml"), "RayJob")["spec"]["entrypoint"])
    assert program == "python" and script.endswith("/rayjobs/tune.py")
    job = parse_job(TuneJob, arguments)
    gpu = only(documents("raycluster.yaml"), "RayCluster")["spec"]["workerGroupSpecs"][1]
    assert job.scale.use_gpu and job.search.max_concurrent * job.scale.num_workers <= gpu["maxReplicas"]
    assert job.name and all(uri.startswith("s3://") for uri in (job.dataset, job.output)), "another attempt must find the first one's folder"


def test_head_works_only_as_a_head_and_groups_begin_empty():
    spec = only(documents("raycluster.yaml"), "RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    for group in groups.values():
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        assert group["template"]["spec"]["restartPolicy"] == "Never"
    assert "nvidia.com/gpu" in containers(groups["gpu"]["template"]["spec"])[0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in containers(groups["cpu"]["template"]["spec"])[0]["resources"]["limits"]


def test_bounds_that_jobs_are_told_are_those_of_the_groups():
    spec = only(documents("raycluster.yaml"), "RayCluster")["spec"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    (told,) = [json.loads(variable["value"]) for variable in head["env"] if variable["name"] == "CAD_NODE_GROUPS"]
    meant = []
    for group in spec["workerGroupSpecs"]:
        limits = containers(group["template"]["spec"])[0]["resources"]["limits"]
        resources = {"CPU": int(limits["cpu"])} | ({"GPU": int(limits["nvidia.com/gpu"])} if "nvidia.com/gpu" in limits else {})
        meant.append({"name": group["groupName"], "resources": resources, "max_count": group["maxReplicas"]})
    assert told == meant


def test_spot_machines_are_for_workers_only():
    spec = only(documents("raycluster.yaml"), "RayCluster")["spec"]
    required = json.dumps(spec["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"])
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        preferred = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        tolerated = {toleration["key"] for toleration in pod["tolerations"]}
        for key in (term["preference"]["matchExpressions"][0]["key"] for term in preferred):
            assert key in tolerated and key in required
        assert pod["terminationGracePeriodSeconds"] <= 30


@pytest.mark.parametrize("role, pod", ALL_PODS, ids=[role for role, _ in ALL_PODS])
def test_pod_has_few_rights_and_fixed_resources(role, pod):
    security = pod["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] > 0 and security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is (role.endswith(":head")), "only the autoscaler speaks to the API server"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        assert key not in pod
    assert not any("hostPath" in volume for volume in pod.get("volumes", []))
    for container in containers(pod):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"] and container["resources"]["limits"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize("role, pod", ALL_PODS, ids=[role for role, _ in ALL_PODS])
def test_long_running_container_has_probes(role, pod):
    if not role.endswith(":submitter"):
        for container in pod["containers"]:
            assert container.keys() >= {"readinessProbe", "livenessProbe"}


@pytest.mark.parametrize("role, pod", ALL_PODS, ids=[role for role, _ in ALL_PODS])
def test_secrets_come_by_reference(role, pod):
    for container in containers(pod):
        for variable in container.get("env", []):
            if any(word in variable["name"] for word in ("PASSWORD", "SECRET", "TOKEN", "KEY")):
                assert "value" not in variable and "secretKeyRef" in variable["valueFrom"], variable["name"]
        assert all("secretRef" in source for source in container.get("envFrom", []))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_holds_no_secret_and_no_open_door(name):
    for document in documents(name):
        assert document["kind"] not in ("Secret", "Ingress")
        if document["kind"] == "Service":
            assert document["spec"].get("type", "ClusterIP") == "ClusterIP"
        text = json.dumps(document)
        assert "://" not in text or not any("@" in uri and ":" in uri.split("@")[0] for uri in _uris(text)), "a password in a URI"


def test_uri_with_a_password_would_be_seen():
    assert any(":" in uri.split("@")[0] for uri in _uris('"postgresql://mlflow:secret@db:5432/mlflow"'))


def _uris(text: str) -> list[str]:
    return [piece.split('"')[0].split()[0].split(",")[0] for piece in text.split("://")[1:]]


def test_ray_and_workers_cannot_read_what_only_drivers_need():
    spec = only(documents("raycluster.yaml"), "RayCluster")["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "cad-ray-token"}
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "cad-storage"}}]


def test_mlflow_server_demands_a_login_and_keeps_data_outside_its_pod():
    objects = documents("mlflow.yaml")
    (server,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    flags = dict(argument.split("=", 1) for argument in server["command"] if argument.startswith("--"))
    assert flags["--app-name"] == "basic-auth"
    assert flags["--backend-store-uri"].startswith("postgresql+psycopg2://") and flags["--artifacts-destination"].startswith("s3://")
    service = only(objects, "Service", "mlflow")
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    (head,) = only(documents("raycluster.yaml"), "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "MLFLOW_TRACKING_URI", "value": f"http://{host}"} in head["env"]
    assert host.split(":")[0] in flags["--allowed-hosts"].split(","), "else MLflow answers 403"
    ini = only(objects, "ConfigMap")["data"]["basic_auth.ini"]
    assert "password" not in ini and f"database_uri = {flags['--backend-store-uri']}" in ini


def test_every_ray_pod_is_behind_the_network_policy():
    policy = only(documents("network.yaml"), "NetworkPolicy")["spec"]
    # The operator gives this label to every pod of a cluster.
    assert policy["podSelector"] == {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]} and policy["policyTypes"] == ["Ingress"]
    assert all(set(source) <= {"podSelector", "namespaceSelector"} for rule in policy["ingress"] for source in rule["from"])
    guarded = {only(documents("mlflow.yaml"), "NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"]["app"] for name in ("mlflow", "mlflow-db")}
    assert guarded == {"mlflow", "mlflow-db"}


def test_readme_creates_every_secret_that_is_referred_to():
    text = (CLUSTER / "README.md").read_text()
    named = set()
    for name in MANIFESTS:
        for document in documents(name):
            for pod in pod_specs(document).values():
                for container in containers(pod):
                    named |= {source["secretRef"]["name"] for source in container.get("envFrom", [])}
                    named |= {v["valueFrom"]["secretKeyRef"]["name"] for v in container.get("env", []) if "valueFrom" in v}
    assert len(named) == 3
    for secret in named | {"cad-ray-token"}:
        assert f"create secret generic {secret} " in text, secret
    for name in MANIFESTS:
        assert f"kubectl apply -f cluster/kuberay/{name}" in text, name
