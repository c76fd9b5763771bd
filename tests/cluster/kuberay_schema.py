"""The fields of ray.io/v1 as JSON schemas: RayCluster and RayJob of KubeRay 1.6, after its field reference.

Written from the reference ("KubeRay CRD API reference", docs.ray.io), strict: a field that is not listed is an error, as for the API server. Whatever
Kubernetes itself defines (pod templates, resources, environment) refers to the Kubernetes schemas that kubernetes-validate ships; they are stricter
than the custom resource definitions, which repeat them without their formats.
"""

from typing import Any

_DEFINITIONS = "https://kubernetes.io/api/_definitions.json#/$defs/"


def _kubernetes(name: str) -> dict[str, Any]:
    return {"$ref": _DEFINITIONS + name}


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


_STRING, _BOOLEAN = {"type": "string"}, {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_STRINGS = {"type": "object", "additionalProperties": _STRING}
_POD_TEMPLATE = _kubernetes("io.k8s.api.core.v1.PodTemplateSpec")

_AUTOSCALER_OPTIONS = _object(
    resources=_kubernetes("io.k8s.api.core.v1.ResourceRequirements"),
    image=_STRING,
    imagePullPolicy={"enum": ["Always", "Never", "IfNotPresent"]},
    securityContext=_kubernetes("io.k8s.api.core.v1.SecurityContext"),
    idleTimeoutSeconds=_COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
    env={"type": "array", "items": _kubernetes("io.k8s.api.core.v1.EnvVar")},
    envFrom={"type": "array", "items": _kubernetes("io.k8s.api.core.v1.EnvFromSource")},
    volumeMounts={"type": "array", "items": _kubernetes("io.k8s.api.core.v1.VolumeMount")},
)

_HEAD_GROUP = _object(
    ("template",),
    template=_POD_TEMPLATE,
    headService=_kubernetes("io.k8s.api.core.v1.Service"),
    enableIngress=_BOOLEAN,
    resources=_STRINGS,
    labels=_STRINGS,
    rayStartParams=_STRINGS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
)

_WORKER_GROUP = _object(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    suspend=_BOOLEAN,
    groupName={"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    idleTimeoutSeconds=_COUNT,
    resources=_STRINGS,
    labels=_STRINGS,
    rayStartParams=_STRINGS,
    template=_POD_TEMPLATE,
    scaleStrategy=_object(workersToDelete={"type": "array", "items": _STRING}),
    numOfHosts={"type": "integer", "minimum": 1},
)

_CLUSTER_SPEC = _object(
    ("headGroupSpec",),
    suspend=_BOOLEAN,
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=_STRING, enableK8sTokenAuth=_BOOLEAN),
    autoscalerOptions=_AUTOSCALER_OPTIONS,
    headServiceAnnotations=_STRINGS,
    enableInTreeAutoscaling=_BOOLEAN,
    gcsFaultToleranceOptions=_object(("redisAddress",), redisAddress=_STRING, redisUsername={}, redisPassword={}, externalStorageNamespace=_STRING),
    headGroupSpec=_HEAD_GROUP,
    rayVersion=_STRING,
    workerGroupSpecs={"type": "array", "items": _WORKER_GROUP},
)

_JOB_SPEC = _object(
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=_COUNT,
    rayClusterSpec=_CLUSTER_SPEC,
    submitterPodTemplate=_POD_TEMPLATE,
    metadata=_STRINGS,
    clusterSelector=_STRINGS,
    submitterConfig=_object(backoffLimit=_COUNT),
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    deletionStrategy={"type": "object"},
    entrypoint=_STRING,
    runtimeEnvYAML=_STRING,
    jobId=_STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypointResources=_STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=_COUNT,
    shutdownAfterJobFinishes=_BOOLEAN,
    suspend=_BOOLEAN,
)


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=_kubernetes("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        spec=spec,
    )


SCHEMAS = {"RayCluster": _resource("RayCluster", _CLUSTER_SPEC), "RayJob": _resource("RayJob", _JOB_SPEC)}
"""Kind -> schema."""
