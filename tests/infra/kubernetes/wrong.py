"""Wrong manifests: each breaks one thing in good.yaml."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.infra.kubernetes.problem import Object, place

GONE = object()
"""Stands for: leave the field out."""

CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec.template.spec"
GROUP = f"{CLUSTER}.workerGroupSpecs[0]"
WORKER = f"{GROUP}.template.spec"
RAY = f"{WORKER}.containers[0]"
JOB, REDIS, POLICY = "RayJob/protect", "StatefulSet/redis", "NetworkPolicy/ray"


@dataclass(frozen=True)
class Wrong:
    """One wrong manifest.

    Attributes:
        path: what is changed, in ``target``.
        value: what it becomes; GONE: left out; a list's path ending in ``[+]`` gets a member more.
        reason: a word of the message.
        told: path that the message must name, where it is another one than ``path``.
        crd: only KubeRay's schema sees it.
        target: the object.
        also: changes that must come with it.
    """

    path: str
    value: Any
    reason: str
    told: str | None = None
    crd: bool = False
    target: str = JOB
    also: tuple[tuple[str, Any], ...] = ()

    @property
    def must_name(self) -> str:
        """The path that the message must name."""
        return self.told if self.told is not None else self.path.removesuffix("[+]")

    def apply(self, good: Sequence[Object]) -> list[Object]:
        """The good objects with this in them."""
        objects = copy.deepcopy(list(good))
        thing = next(thing for thing in objects if place(thing) == self.target)
        for path, value in ((self.path, self.value), *self.also):
            change(thing, path, copy.deepcopy(value) if value is not GONE else GONE)
        return objects

    def __str__(self) -> str:
        return f"{self.target}:{self.must_name.removeprefix(CLUSTER)}:{self.reason}"


def change(thing: Object, path: str, value: Any) -> None:
    """Set, leave out or append at a path such as ``spec.containers[0].env[+]``; a key with dots is written ``<a.b/c>``."""
    keys: list[Any] = [
        dotted or (int(number) if number.isdigit() else number) if dotted or number else word
        for dotted, number, word in re.findall(r"<([^>]+)>|\[([+\d]+)\]|([^.\[\]<>]+)", path)
    ]
    holder: Any = thing
    for key in keys[:-1]:
        holder = holder.setdefault(key, {}) if isinstance(holder, dict) else holder[key]
    if keys[-1] == "+":
        holder.append(value)
    elif value is GONE:
        del holder[keys[-1]]
    else:
        holder[keys[-1]] = value


_GROUP2 = {"groupName": "gpu", "template": {"spec": {"containers": []}}}
_CONTAINER = {"name": "ray-worker", "image": "a/b:1"}

KUBERAY = (
    Wrong("metadata.name", "a" * 48, "47"),
    Wrong("metadata.name", "1st", "small letters"),
    Wrong("metadata.name", "Protect_1", "small letters"),
    Wrong("spec.shutdownAfterJobFinishes", GONE, "only with shutdownAfterJobFinishes", "spec.ttlSecondsAfterFinished"),
    Wrong("spec.ttlSecondsAfterFinished", -1, "negative"),
    Wrong("spec.activeDeadlineSeconds", 0, "positive"),
    Wrong("spec.preRunningDeadlineSeconds", 90000, "never reached"),
    Wrong("spec.backoffLimit", -1, "negative"),
    Wrong("spec.submissionMode", "HttpMode", "HTTPMode"),
    Wrong("spec.submissionMode", "HTTPMode", "no submitter's pod", "spec.submitterPodTemplate"),
    Wrong("spec.submissionMode", "InteractiveMode", "InteractiveMode", "spec.backoffLimit"),
    Wrong("spec.entrypoint", " ", "nothing to submit"),
    Wrong("spec.suspend", True, "shutdownAfterJobFinishes", also=(("spec.shutdownAfterJobFinishes", False),)),
    Wrong("spec.rayClusterSpec", GONE, "neither", "spec"),
    Wrong("spec.clusterSelector", {"ray.io/cluster": "one"}, "each try", "spec.backoffLimit"),
    Wrong("spec.clusterSelector", {"cluster": "one"}, "ray.io/cluster"),
    Wrong("spec.runtimeEnvYAML", "a: [", "YAML"),
    Wrong("spec.entrypointResources", "{a: 1}", "JSON"),
    Wrong(
        "spec.deletionStrategy",
        {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]},
        "shutdownAfterJobFinishes",
        "spec.deletionStrategy.deletionRules",
    ),
    Wrong("spec.deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, "both"),
    Wrong("spec.submitterPodTemplate.spec.restartPolicy", "Always", "Job"),
    Wrong("spec.submitterPodTemplate.spec.restartPolicy", GONE, "Job"),
    Wrong(f"{HEAD}.restartPolicy", "Always", "autoscaler v2"),
    Wrong(f"{WORKER}.restartPolicy", "OnFailure", "autoscaler v2"),
    Wrong(f"{HEAD}.automountServiceAccountToken", False, "autoscaler"),
    Wrong(f"{CLUSTER}.enableInTreeAutoscaling", False, "enableInTreeAutoscaling", f"{CLUSTER}.autoscalerOptions"),
    Wrong(f"{HEAD}.containers[0].env[+]", {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}, "redisAddress"),
    Wrong(f"{HEAD}.containers[0].env[+]", {"name": "REDIS_USERNAME", "value": "me"}, "redisUsername"),
    Wrong(f"{HEAD}.containers[0].env[+]", {"name": "RAY_enable_autoscaler_v2", "value": "1"}, "autoscalerOptions.version"),
    Wrong(f"{CLUSTER}.headGroupSpec.rayStartParams.redis-password", "x", "gcsFaultToleranceOptions"),
    Wrong("metadata.annotations", {"ray.io/ft-enabled": "true"}, "gcsFaultToleranceOptions"),
    Wrong(f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress", GONE, "required"),
    Wrong(f"{CLUSTER}.gcsFaultToleranceOptions.backend", "rocksdb", "feature gate"),
    Wrong(f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword", {"value": "example"}, "literal"),
    Wrong(f"{CLUSTER}.workerGroupSpecs[+]", _GROUP2, "twice", f"{CLUSTER}.workerGroupSpecs[1].groupName"),
    Wrong(f"{GROUP}.replicas", 17, "maxReplicas"),
    Wrong(f"{GROUP}.minReplicas", 3, "minReplicas", f"{GROUP}.replicas"),
    Wrong(f"{GROUP}.numOfHosts", 0, "below 1"),
    Wrong(f"{GROUP}.suspend", True, "autoscaling"),
    Wrong(f"{GROUP}.rayStartParams.objectstore-memory", "1", "ray start"),
    Wrong(f"{GROUP}.rayStartParams.num-gpus", 1, "string"),
    Wrong(f"{GROUP}.rayStartParams.object-store-memory", "9663676416", "/dev/shm"),
    Wrong(f"{GROUP}.rayStartParams.object-store-memory", "32000000000", "container's memory"),
    Wrong(f"{GROUP}.resources", {"CPU": "7"}, "either", also=((f"{GROUP}.rayStartParams.num-cpus", "7"),)),
    Wrong(f"{GROUP}.labels", {"ray.io/zone": "a b"}, "label"),
    Wrong(f"{WORKER}.containers", [], "at least one"),
    Wrong(f"{RAY}.resources.limits.memory", GONE, "node's"),
    Wrong(f"{CLUSTER}.rayVersion", "2.51.0", "2.52.0"),
    Wrong(f"{CLUSTER}.headGroupSpec.rayStartParams.dashboard-host", "127.0.0.1", "operator"),
    Wrong(f"{CLUSTER}.headGroupSpec.rayStartParams.include-dashboard", "false", "dashboard"),
    Wrong("apiVersion", "ray.io/v1alpha1", "ray.io/v1"),
)
"""Refused by KubeRay's own rules, or of no use to it."""

SCHEMA = (
    Wrong("spec.backofLimit", 2, "no such field", crd=True),
    Wrong("spec.jobSpec", {}, "no such field", crd=True),
    Wrong("spec.backoffLimit", "2", "integer", crd=True),
    Wrong("spec.activeDeadlineSeconds", 2**31, "outside", crd=True),
    Wrong("spec.shutdownAfterJobFinishes", "true", "boolean", crd=True),
    Wrong("spec.managedBy", "somebody", "managedBy", crd=True),
    Wrong("spec.deletionStrategy", {"deletionRules": []}, "members", "spec.deletionStrategy.deletionRules", crd=True),
    Wrong(
        "spec.deletionStrategy",
        {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}]},
        "together",
        "spec.deletionStrategy.deletionRules[0].condition",
        crd=True,
    ),
    Wrong(f"{CLUSTER}.autoscalerOptions.upscalingMode", "Fast", "none of", crd=True),
    Wrong(f"{CLUSTER}.authOptions.mode", "tokens", "none of", crd=True),
    Wrong(f"{CLUSTER}.autoscalerOptions.resources.limits.cpu", "half", "match", crd=True),
    Wrong(f"{CLUSTER}.headGroupSpec.template", GONE, "required", crd=True),
    Wrong(f"{CLUSTER}.headGroupSpecs", {}, "no such field", crd=True),
    Wrong(f"{GROUP}.groupName", GONE, "required", crd=True),
    Wrong(f"{GROUP}.maxReplica", 3, "no such field", crd=True),
    Wrong(f"{RAY}.imagePulPolicy", "Always", "unexpected", RAY),
    Wrong(f"{RAY}.imagePulPolicy", "Always", "no such field", crd=True),
    Wrong(f"{RAY}.ports[0].containerPort", "8080", "integer"),
    Wrong(f"{RAY}.lifecycle.preStop.exec.command", "drain", "array"),
    Wrong(f"{WORKER}.tolerations", {"key": "a"}, "array"),
    Wrong(f"{WORKER}.nodeSelector", None, "null"),
    Wrong(f"{WORKER}.terminationGracePeriodSeconds", 2.5, "integer"),
    Wrong("spec.template.spec.container", [], "unexpected", "spec.template.spec", target=REDIS),
    Wrong("spec.replicas", "1", "integer", target=REDIS),
    Wrong("spec.replicas", 2**31, "int32", target=REDIS),
    Wrong("spec.policyType", ["Ingress"], "unexpected", "spec", target=POLICY),
    Wrong("apiVersion", "extensions/v1beta1", "no extensions/v1beta1", "kind", target=POLICY),
    Wrong("spec.accessModes", ["ReadOnly"], "ReadWriteOnce", "spec.accessModes[0]", target="PersistentVolumeClaim/weights"),
    Wrong("spec.resources.requests.storage", "10GiB", "no size", target="PersistentVolumeClaim/weights"),
)
"""Refused by a schema, or by the words that it only describes."""

PODS = (
    Wrong(f"{RAY}.volumeMounts[+]", {"name": "cache", "mountPath": "/cache"}, "no volume", f"{RAY}.volumeMounts[3].name"),
    Wrong(f"{RAY}.volumeMounts[+]", {"name": "shm", "mountPath": "/tmp"}, "twice", f"{RAY}.volumeMounts[3].mountPath"),
    Wrong(f"{RAY}.volumeMounts[0].mountPath", "tmp", "start with /"),
    Wrong(f"{WORKER}.volumes[+]", {"name": "shm", "emptyDir": {}}, "twice", f"{WORKER}.volumes[3].name"),
    Wrong(f"{WORKER}.volumes[+]", {"name": "more", "emptyDir": {}}, "nothing mounts", f"{WORKER}.volumes[3].name"),
    Wrong(f"{WORKER}.volumes[0].configMap", {"name": "protect-job"}, "2 sources", f"{WORKER}.volumes[0]"),
    Wrong(f"{WORKER}.volumes[1].emptyDir.sizeLimit", "27Gi", "memory"),
    Wrong(f"{WORKER}.volumes[1].emptyDir.sizeLimit", GONE, "without a limit"),
    Wrong(f"{WORKER}.volumes[1].emptyDir.medium", "RAM", "none of"),
    Wrong(f"{RAY}.resources.limits.ephemeral-storage", "99Gi", "100 GiB", f"{WORKER}.volumes"),
    Wrong(f"{WORKER}.containers[+]", _CONTAINER, "twice", f"{WORKER}.containers[1].name"),
    Wrong(f"{RAY}.name", "ray_worker", "small letters"),
    Wrong(f"{RAY}.env[+]", {"name": "FACEMAE_LOG", "value": "text"}, "twice", f"{RAY}.env[1].name"),
    Wrong(f"{RAY}.env[+]", {"name": "N", "value": 3}, "quote", f"{RAY}.env[1].value"),
    Wrong(f"{RAY}.env[+]", {"name": "1 N", "value": "3"}, "variable's name", f"{RAY}.env[1].name"),
    Wrong(
        f"{RAY}.env[+]",
        {"name": "N", "value": "3", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        "both",
        f"{RAY}.env[1]",
    ),
    Wrong(f"{RAY}.ports[0].containerPort", 70000, "65535"),
    Wrong(f"{RAY}.ports[0].name", "metrics-for-prometheus", "port's name"),
    Wrong(f"{RAY}.ports[+]", {"name": "metrics", "containerPort": 9090}, "twice", f"{RAY}.ports[1].name"),
    Wrong(f"{RAY}.resources.requests.cpu", "8", "more than the limit"),
    Wrong(f"{RAY}.resources.limits.memory", "26Gb", "no quantity"),
    Wrong(f"{RAY}.resources.limits.memory", "26", "suffix"),
    Wrong(f"{RAY}.resources.limits.<nvidia.com/gpu>", "0.5", "whole", f"{RAY}.resources.limits.nvidia.com/gpu"),
    Wrong(f"{RAY}.resources.limits.<nvidia.com/gpu>", 2, "equal", f"{RAY}.resources.requests.nvidia.com/gpu"),
    Wrong(f"{CLUSTER}.autoscalerOptions.resources.requests.cpu", "1", "more than the limit"),
    Wrong(f"{WORKER}.tolerations[0].effect", "NoRun", "none of"),
    Wrong(f"{WORKER}.tolerations[0].value", "present", "Exists"),
    Wrong(f"{WORKER}.tolerations[0].operator", "In", "none of"),
    Wrong(f"{WORKER}.nodeSelector.<gpu type>", "a", "no key", f"{WORKER}.nodeSelector.gpu type"),
    Wrong(
        f"{WORKER}.topologySpreadConstraints[0].labelSelector.matchLabels",
        {"ray.io/group": "cpu"},
        "does not select",
        f"{WORKER}.topologySpreadConstraints[0].labelSelector",
    ),
    Wrong(f"{WORKER}.topologySpreadConstraints[0].maxSkew", 0, "below 1"),
    Wrong(f"{RAY}.livenessProbe.timeoutSeconds", 31, "longer than the period"),
    Wrong(f"{RAY}.livenessProbe.terminationGracePeriodSeconds", 301, "exceeds"),
    Wrong(f"{RAY}.livenessProbe.successThreshold", 2, "must be 1"),
    Wrong(f"{RAY}.livenessProbe.tcpSocket", {"port": 6379}, "has 2", f"{RAY}.livenessProbe"),
    Wrong(f"{RAY}.livenessProbe", {"httpGet": {"port": "dashboard"}}, "no port", f"{RAY}.livenessProbe.httpGet.port"),
    Wrong(f"{WORKER}.terminationGracePeriodSeconds", 240, "longer", f"{RAY}.lifecycle.preStop"),
    Wrong(f"{WORKER}.terminationGracePeriodSeconds", GONE, "longer", f"{RAY}.lifecycle.preStop"),
    Wrong(f"{RAY}.lifecycle.preStop", {"sleep": {"seconds": 300}}, "sleep may take"),
    Wrong(f"{RAY}.lifecycle.preStop", {"exec": {"command": ["sh", "-c", "sleep 400"]}}, "sleep may take"),
    Wrong(f"{RAY}.imagePullPolicy", "Sometimes", "none of"),
    Wrong("spec.template.spec.restartPolicy", "Never", "Always", target=REDIS),
    Wrong("spec.template.spec.containers[0].readinessProbe.tcpSocket.port", "redi", "no port", target=REDIS),
)
"""Refused by the API server's validation, or broken only once the pod runs."""

SECURITY = (
    Wrong(f"{WORKER}.securityContext.runAsNonRoot", GONE, "must be true", f"{RAY}.securityContext.runAsNonRoot"),
    Wrong(f"{WORKER}.securityContext.runAsUser", 0, "root", f"{RAY}.securityContext.runAsUser"),
    Wrong(f"{RAY}.securityContext.allowPrivilegeEscalation", GONE, "false"),
    Wrong(f"{RAY}.securityContext.privileged", True, "not allowed"),
    Wrong(f"{RAY}.securityContext.capabilities", {"drop": ["NET_RAW"]}, "ALL", f"{RAY}.securityContext.capabilities.drop"),
    Wrong(f"{RAY}.securityContext.capabilities.add", ["SYS_ADMIN"], "NET_BIND_SERVICE"),
    Wrong(f"{WORKER}.securityContext.seccompProfile", {"type": "Unconfined"}, "RuntimeDefault", f"{RAY}.securityContext.seccompProfile"),
    Wrong(f"{CLUSTER}.autoscalerOptions.securityContext", GONE, "false", f"{CLUSTER}.autoscalerOptions.securityContext"),
    Wrong("spec.submitterPodTemplate", GONE, "K8sJobMode"),
    Wrong(f"{WORKER}.hostNetwork", True, "node's"),
    Wrong(f"{WORKER}.volumes[0]", {"name": "tmp", "hostPath": {"path": "/tmp"}}, "not allowed", f"{WORKER}.volumes[0].hostPath"),
    Wrong(f"{RAY}.ports[0].hostPort", 8080, "node's port"),
    Wrong(f"{RAY}.volumeMounts[0].mountPath", "/var/tmp", "/tmp", f"{RAY}.volumeMounts"),
    Wrong(f"{RAY}.image", "registry.example.com/facemae", "no tag"),
    Wrong(f"{RAY}.image", "registry.example.com/facemae:latest", "latest"),
    Wrong(f"{RAY}.image", "registry.example.com/Face MAE:1", "no image"),
    Wrong(f"{RAY}.env[+]", {"name": "AWS_SECRET_ACCESS_KEY", "value": "wJalrXUtnFEMI"}, "valueFrom", f"{RAY}.env[1].value"),
    Wrong(f"{RAY}.env[+]", {"name": "S3", "value": "http://me:pass@host"}, "user or a password", f"{RAY}.env[1].value"),
    Wrong("spec.entrypoint", "facemae protect --password=hunter22", "secret"),
    Wrong("data.<job.yaml>", "rekey: 'x'\naws_secret_access_key: abcdefgh", "secret", "data.job.yaml", target="ConfigMap/protect-job"),
    Wrong("data.<job.yaml>", "key: AKIAIOSFODNN7EXAMPLE", "AWS", "data.job.yaml", target="ConfigMap/protect-job"),
    Wrong("data.<job.yaml>", "source: s3://AKIA:abc@faces", "user or a password", "data.job.yaml", target="ConfigMap/protect-job"),
    Wrong("data.password", "not base64!", "base64", target="Secret/redis"),
    Wrong("stringData", {"key": "AKIAIOSFODNN7EXAMPLE"}, "AWS", "stringData.key", target="Secret/redis"),
)
"""Refused by Pod Security's "restricted", unsafe, or a secret where all can read it."""

TOGETHER = (
    Wrong("metadata.name", "other", "no ConfigMap", f"{HEAD}.volumes[2].configMap.name", target="ConfigMap/protect-job"),
    Wrong(f"{HEAD}.volumes[2].configMap.items[0].key", "jobs.yaml", "no key", f"{HEAD}.volumes[2].configMap.name"),
    Wrong(f"{RAY}.envFrom[0].secretRef.name", "facemae-s4", "no Secret"),
    Wrong(f"{RAY}.envFrom[+]", {"configMapRef": {"name": "settings"}}, "no ConfigMap", f"{RAY}.envFrom[1].configMapRef.name"),
    Wrong(
        f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.key",
        "pass",
        "no key",
        f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.name",
    ),
    Wrong(f"{WORKER}.serviceAccountName", "facemea", "no ServiceAccount"),
    Wrong(f"{WORKER}.priorityClassName", "high", "no PriorityClass"),
    Wrong(f"{WORKER}.imagePullSecrets", [{"name": "registry"}], "no Secret", f"{WORKER}.imagePullSecrets[0].name"),
    Wrong(f"{WORKER}.volumes[2].persistentVolumeClaim.claimName", "weight", "no PersistentVolumeClaim"),
    Wrong("metadata.namespace", "elsewhere", "no ConfigMap", f"{HEAD}.volumes[2].configMap.name"),
    Wrong("spec.podSelector.matchLabels", {"app": "ray"}, "selects no pod", "spec.podSelector", target=POLICY),
    Wrong("spec.ingress[0].from[0].podSelector.matchLabels", {"app": "x"}, "no pod", "spec.ingress[0].from[0].podSelector", target=POLICY),
    Wrong("spec.ingress[1].ports[0].port", 82650, "65535", target=POLICY),
    Wrong("spec.policyTypes", ["Ingress"], "does nothing", "spec.egress", target=POLICY),
    Wrong("spec.policyTypes", ["ingress", "Egress"], "none of", "spec.policyTypes[0]", target=POLICY),
    Wrong("spec.egress[2].to[0].ipBlock.cidr", "0.0.0.0/33", "0.0.0.0/33", "spec.egress[2].to[0].ipBlock", target=POLICY),
    Wrong("spec.egress[2].to[0].ipBlock.cidr", "10.0.0.0/8", "within", "spec.egress[2].to[0].ipBlock.except", target=POLICY),
    Wrong("spec.selector", {"app": "reddis"}, "selects no pod", target="Service/redis"),
    Wrong("spec.ports[0].targetPort", "tls", "no container", target="Service/redis"),
    Wrong("spec.selector.matchLabels", {"app": "other"}, "does not select", "spec.selector", target=REDIS),
    Wrong("metadata.labels", {"app": "a/b"}, "label's value", "metadata.labels.app", target=REDIS),
    Wrong("metadata.annotations", {"-x": "y"}, "no key", "metadata.annotations.-x", target=REDIS),
    Wrong("metadata.annotations", {"x": True}, "quote", "metadata.annotations.x"),
    Wrong("metadata.namespace", "faces", "whole cluster", target="PriorityClass/facemae-batch"),
    Wrong("metadata.name", "Face", "small letters", target="ConfigMap/protect-job"),
    Wrong("value", 2 * 10**9, "system's", target="PriorityClass/facemae-batch"),
)
"""Refused for what is beside it, or for its name."""

WRONG = (*KUBERAY, *SCHEMA, *PODS, *SECURITY, *TOGETHER)
