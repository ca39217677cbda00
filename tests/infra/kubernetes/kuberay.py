"""KubeRay's own rules: those of its operator's validation (v1.7), and what its operator and `ray start` cannot work with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from tests.infra.kubernetes.names import label_problem, name_problem
from tests.infra.kubernetes.pod import Pod, pods, ray_cluster
from tests.infra.kubernetes.problem import Found, Object, join, listed, twice
from tests.infra.kubernetes.quantity import quantity

MAX_NAME = {"RayJob": 47, "RayCluster": 53}
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
FEATURES = {"RayJobDeletionPolicy"}
"""Feature gates of the operator that are on unless its administrator says otherwise."""

API_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"

_BY_HAND = {
    "RAY_REDIS_ADDRESS": "redisAddress",
    "REDIS_PASSWORD": "redisPassword",
    "REDIS_USERNAME": "redisUsername",
    "RAY_external_storage_namespace": "externalStorageNamespace",
}
_FT_ANNOTATIONS = ("ray.io/ft-enabled", "ray.io/external-storage-namespace")
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")


def check(thing: Object) -> Found:
    """What KubeRay would refuse of a RayJob or a RayCluster."""
    kind, name = thing["kind"], str(thing["metadata"].get("name"))
    if len(name) > MAX_NAME[kind]:
        yield "metadata.name", f"{len(name)} characters, KubeRay takes {MAX_NAME[kind]}"
    if reason := name_problem(name, "dns-1035"):
        yield "metadata.name", reason
    if kind == "RayJob":
        yield from _job(thing.get("spec") or {})
    found = ray_cluster(thing)
    if found is not None:
        yield from _cluster(found[0], found[1], thing["metadata"].get("annotations") or {})
    for pod in pods(thing):
        if pod.is_ray:
            yield from _group(pod)
        else:
            yield from _submitter(pod)


def _job(spec: Object) -> Found:
    selected, own = spec.get("clusterSelector"), spec.get("rayClusterSpec")
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    backoff, mode = spec.get("backoffLimit", 0), spec.get("submissionMode", "K8sJobMode")
    if not selected and not own:
        yield "spec", "neither rayClusterSpec nor clusterSelector"
    if selected:
        yield from _selected(spec, selected, mode)
    if spec.get("suspend") and (selected or not ends):
        yield "spec.suspend", "only with shutdownAfterJobFinishes and a cluster of its own"
    for key in ("ttlSecondsAfterFinished", "backoffLimit"):
        if spec.get(key, 0) < 0:
            yield f"spec.{key}", "is negative"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not ends:
        yield "spec.ttlSecondsAfterFinished", "only with shutdownAfterJobFinishes"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"spec.{key}", "is not positive"
    if 0 < spec.get("activeDeadlineSeconds", 0) <= spec.get("preRunningDeadlineSeconds", 0):
        yield "spec.preRunningDeadlineSeconds", "is never reached: activeDeadlineSeconds ends the job before"
    if mode not in SUBMISSION_MODES:
        yield "spec.submissionMode", f"{mode!r} is none of {', '.join(SUBMISSION_MODES)}"
    if mode == "InteractiveMode" and backoff > 0:
        yield "spec.backoffLimit", "not in InteractiveMode"
    if mode == "InteractiveMode" and spec.get("entrypoint"):
        yield "spec.entrypoint", "not in InteractiveMode: the user submits"
    if mode in ("K8sJobMode", "HTTPMode", "SidecarMode") and not str(spec.get("entrypoint", "")).strip():
        yield "spec.entrypoint", f"{mode} has nothing to submit"
    for key in ("submitterPodTemplate", "submitterConfig"):
        if key in spec and mode != "K8sJobMode":
            yield f"spec.{key}", f"not in {mode}: it has no submitter's pod"
    head = ((own or {}).get("headGroupSpec") or {}).get("template", {}).get("spec", {})
    if mode == "SidecarMode" and head.get("restartPolicy", "Never") != "Never":
        yield "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Never or unset in SidecarMode"
    yield from _runtime_env(spec)
    if (text := spec.get("entrypointResources")) is not None and not _is_json_object(text):
        yield "spec.entrypointResources", "is no JSON object"
    yield from _deletion(spec)


def _selected(spec: Object, selected: Object, mode: str) -> Found:
    if not selected.get("ray.io/cluster"):
        yield "spec.clusterSelector", "names no ray.io/cluster"
    if spec.get("backoffLimit", 0) > 0:
        yield "spec.backoffLimit", "not with clusterSelector: each try needs a cluster of its own"
    if mode == "SidecarMode":
        yield "spec.submissionMode", "SidecarMode is not for a clusterSelector"
    if spec.get("rayClusterSpec"):
        yield "spec.rayClusterSpec", "is ignored beside clusterSelector"


def _runtime_env(spec: Object) -> Found:
    try:
        content = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError as error:
        yield "spec.runtimeEnvYAML", f"is no YAML: {str(error).splitlines()[0]}"
        return
    if not isinstance(content, dict):
        yield "spec.runtimeEnvYAML", "is no mapping"


def _is_json_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False


def _deletion(spec: Object) -> Found:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    path, rules = "spec.deletionStrategy", strategy.get("deletionRules") or []
    legacy = [strategy[key] for key in ("onSuccess", "onFailure") if key in strategy]
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield f"{path}.deletionRules", "not together with shutdownAfterJobFinishes"
    if rules and legacy:
        yield f"{path}.deletionRules", "not together with onSuccess and onFailure"
    if not rules and len(legacy) != 2:
        yield path, "needs deletionRules, or both onSuccess and onFailure"
    if spec.get("shutdownAfterJobFinishes") and any(policy.get("policy") == "DeleteNone" for policy in legacy):
        yield path, "DeleteNone contradicts shutdownAfterJobFinishes"
    times: dict[tuple[str, str], int] = {}
    for where, rule in listed(strategy, "deletionRules", path):
        condition, policy = rule.get("condition") or {}, rule.get("policy", "")
        if policy == "DeleteWorkers" and (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
            yield f"{where}.policy", "DeleteWorkers is not supported with autoscaling"
        if spec.get("clusterSelector") and policy in ("DeleteWorkers", "DeleteCluster"):
            yield f"{where}.policy", f"{policy} is not supported with clusterSelector"
        status = str(condition.get("jobStatus") or condition.get("jobDeploymentStatus"))
        if (status, policy) in times:
            yield where, f"a second rule for {policy} after {status}"
        times[status, policy] = condition.get("ttlSeconds", 0)
        later = [times[status, other] for other in _DELETION_ORDER if (status, other) in times]
        if later != sorted(later):
            yield f"{where}.condition.ttlSeconds", f"{' <= '.join(_DELETION_ORDER)} must hold after {status}"


def _cluster(path: str, spec: Object, annotations: Object) -> Found:
    head = (spec.get("headGroupSpec") or {}).get("template") or {}
    containers = (head.get("spec") or {}).get("containers") or [{}]
    names = {variable.get("name"): variable.get("value") for variable in containers[0].get("env") or ()}
    env = f"{path}.headGroupSpec.template.spec.containers[0].env"
    options, scaling = spec.get("gcsFaultToleranceOptions"), spec.get("autoscalerOptions") or {}
    params = (spec.get("headGroupSpec") or {}).get("rayStartParams") or {}
    for variable, field in _BY_HAND.items():
        if variable in names:
            yield env, f"{variable} by hand: use gcsFaultToleranceOptions.{field}"
    for param in ("redis-password", "redis-username"):
        if param in params:
            yield f"{path}.headGroupSpec.rayStartParams.{param}", "use gcsFaultToleranceOptions"
    for annotation in _FT_ANNOTATIONS:
        if annotation in annotations and options is not None:
            yield f"metadata.annotations.{annotation}", "not together with gcsFaultToleranceOptions"
    if options is not None:
        yield from _fault_tolerance(f"{path}.gcsFaultToleranceOptions", options)
    scaled = bool(spec.get("enableInTreeAutoscaling"))
    scaler = names.get("RAY_enable_autoscaler_v2")
    if scaler is not None and not scaled:
        yield env, "RAY_enable_autoscaler_v2 without enableInTreeAutoscaling"
    if scaler is not None and "version" in scaling:
        yield env, "RAY_enable_autoscaler_v2 beside autoscalerOptions.version"
    if scaling and not scaled:
        yield f"{path}.autoscalerOptions", "does nothing without enableInTreeAutoscaling"
    mounted = any(mount.get("mountPath") == API_TOKEN for mount in scaling.get("volumeMounts") or ())
    if scaled and (head.get("spec") or {}).get("automountServiceAccountToken") is False and not mounted:
        yield f"{path}.headGroupSpec.template.spec.automountServiceAccountToken", "the autoscaler asks the API server with this token"
    yield from _restarts(path, spec, scaled and (scaling.get("version") == "v2" or scaler in ("1", "true")))
    yield from twice(listed(spec, "workerGroupSpecs", path), "groupName", "the group")
    for where, group in listed(spec, "workerGroupSpecs", path):
        if group.get("suspend") and scaled:
            yield f"{where}.suspend", "not with autoscaling"
        yield from _replicas(where, group)
    yield from _token(path, spec)


def _restarts(path: str, spec: Object, is_v2: bool) -> Found:
    groups = [(join(path, "headGroupSpec"), spec.get("headGroupSpec") or {}), *listed(spec, "workerGroupSpecs", path)]
    for where, group in groups:
        policy = ((group.get("template") or {}).get("spec") or {}).get("restartPolicy", "Never")
        if is_v2 and policy != "Never":
            yield f"{where}.template.spec.restartPolicy", f"{policy}: Never or unset with autoscaler v2"


def _fault_tolerance(path: str, options: Object) -> Found:
    backend = options.get("backend", "redis")
    if backend == "redis" and not options.get("redisAddress"):
        yield f"{path}.redisAddress", "is required by the redis backend"
    if backend == "redis" and "storage" in options:
        yield f"{path}.storage", "is for the rocksdb backend"
    if backend == "rocksdb":
        if "GCSFaultToleranceEmbeddedStorage" not in FEATURES:
            yield f"{path}.backend", "rocksdb needs the operator's feature gate GCSFaultToleranceEmbeddedStorage, off by default"
        for key in ("redisAddress", "redisPassword", "redisUsername"):
            if key in options:
                yield f"{path}.{key}", "not with the rocksdb backend"
    for key in ("redisPassword", "redisUsername"):
        if (options.get(key) or {}).get("value"):
            yield f"{path}.{key}.value", "a literal: use valueFrom.secretKeyRef"


def _replicas(path: str, group: Object) -> Found:
    low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    now = group.get("replicas", low)
    if not 0 <= low <= now <= high:
        yield f"{path}.replicas", f"0 <= {low} (minReplicas) <= {now} (replicas) <= {high} (maxReplicas) does not hold"
    if group.get("numOfHosts", 1) < 1:
        yield f"{path}.numOfHosts", "is below 1"


def _token(path: str, spec: Object) -> Found:
    if (spec.get("authOptions") or {}).get("mode") != "token":
        return
    version = re.fullmatch(r"v?(\d+)\.(\d+).*", str(spec.get("rayVersion", "")))
    if version is None or (int(version[1]), int(version[2])) < (2, 52):
        yield f"{path}.rayVersion", "2.52.0 or later is needed for authOptions.mode token"


@cache
def ray_start_options() -> frozenset[str]:
    """The flags of the installed Ray's `ray start`, without dashes."""
    from ray.scripts.scripts import start

    return frozenset(name.lstrip("-") for option in start.params for name in option.opts)


def _group(pod: Pod) -> Found:
    path, group = pod.path.rpartition(".")[0], pod.group
    params = group.get("rayStartParams") or {}
    if not pod.spec.get("containers"):
        yield f"{pod.spec_path}.containers", "at least one container is needed"
        return
    for key, value in params.items():
        if key == "labels":
            yield f"{path}.rayStartParams.labels", "use the group's labels"
        elif key not in ray_start_options():
            yield f"{path}.rayStartParams.{key}", "`ray start` has no such option"
        if not isinstance(value, str):
            yield f"{path}.rayStartParams.{key}", f"{value!r} is no string"
    if group.get("resources") and any(key in params for key in _RESOURCE_PARAMS):
        yield f"{path}.resources", "either resources or rayStartParams' " + ", ".join(_RESOURCE_PARAMS)
    for key, value in (group.get("labels") or {}).items():
        if reason := label_problem(key, value):
            yield f"{path}.labels.{key}", reason
    if pod.role == "head" and params.get("dashboard-host", "0.0.0.0") not in ("0.0.0.0", "::"):
        yield f"{path}.rayStartParams.dashboard-host", "KubeRay's operator and the submitter reach the dashboard by the network: 0.0.0.0"
    if pod.role == "head" and str(params.get("include-dashboard", "true")).lower() != "true":
        yield f"{path}.rayStartParams.include-dashboard", "jobs are handed to the dashboard"
    yield from _ray_container(pod, path, params)


def _ray_container(pod: Pod, path: str, params: Object) -> Found:
    container = pod.spec["containers"][0]
    limits = ((container.get("resources") or {}).get("limits")) or {}
    for key in ("cpu", "memory"):
        named = "num-cpus" if key == "cpu" else key
        if key not in limits and named not in params and named not in (pod.group.get("resources") or {}):
            yield f"{pod.spec_path}.containers[0].resources.limits.{key}", "Ray would take the node's: KubeRay reads the limit"
    store, memory = params.get("object-store-memory"), quantity(limits.get("memory"))
    if store is None:
        return
    if not str(store).isdigit():
        yield f"{path}.rayStartParams.object-store-memory", f"{store!r} is no number of bytes"
    elif memory is not None and int(store) > memory:
        yield f"{path}.rayStartParams.object-store-memory", f"{store} is more than the container's memory, {memory}"
    else:
        for where, size in _shared_memory(pod):
            if int(store) > size:
                yield f"{path}.rayStartParams.object-store-memory", f"{store} is more than {where} holds at /dev/shm, {size}"


def _shared_memory(pod: Pod) -> Iterator[tuple[str, Any]]:
    mounts = {mount.get("name") for mount in pod.spec["containers"][0].get("volumeMounts") or () if mount.get("mountPath") == "/dev/shm"}
    for path, volume in listed(pod.spec, "volumes", pod.spec_path):
        size = quantity((volume.get("emptyDir") or {}).get("sizeLimit"))
        if volume.get("name") in mounts and size is not None:
            yield path, size


def _submitter(pod: Pod) -> Found:
    if pod.role == "submitter" and pod.spec.get("restartPolicy") not in ("Never", "OnFailure"):
        yield f"{pod.spec_path}.restartPolicy", "Never or OnFailure: a Kubernetes Job runs it"
