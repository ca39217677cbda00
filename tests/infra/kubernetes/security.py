"""Pod Security's profile "restricted", images that can be told apart, and places to write to below a read-only root."""

from __future__ import annotations

import re

from tests.infra.kubernetes.pod import Pod
from tests.infra.kubernetes.problem import Found, Object, join, listed

_VOLUMES = {"name", "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC")
_PROFILES = ("RuntimeDefault", "Localhost")
_WORD = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::\d+)?/)?{_WORD}(?:/{_WORD})*(?::(?P<tag>\w[\w.-]{{0,127}}))?(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?",
    re.ASCII,
)


def check(pod: Pod) -> Found:
    """What an admission controller that enforces "restricted" refuses, and images without a version."""
    spec, path = pod.spec, pod.spec_path
    for key in _HOST:
        if spec.get(key):
            yield join(path, key), "shares the node's"
    for where, volume in listed(spec, "volumes", path):
        for kind in set(volume) - _VOLUMES:
            yield join(where, kind), "this kind of volume is not allowed"
    outer = spec.get("securityContext") or {}
    if outer.get("sysctls"):
        yield f"{path}.securityContext.sysctls", "are not allowed"
    for where, container in pod.all_containers():
        yield from _container(where, container, outer)
        yield from _writes(pod, where, container)
        if "image" in container or container is not pod.autoscaler:  # KubeRay gives the autoscaler the head's
            yield from image(where, container)


def check_submission(thing: Object) -> Found:
    """The pod that KubeRay makes up where a RayJob gives no template for its submitter has no security context."""
    spec = thing.get("spec") or {}
    if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode" and "submitterPodTemplate" not in spec:
        yield "spec.submitterPodTemplate", "is required in K8sJobMode: KubeRay's own has no securityContext and is refused"


def _container(path: str, container: Object, outer: Object) -> Found:
    own = container.get("securityContext") or {}
    where = join(path, "securityContext")
    seen = outer | own
    if seen.get("runAsNonRoot") is not True:
        yield f"{where}.runAsNonRoot", "must be true, here or for the pod"
    if seen.get("runAsUser") == 0:
        yield f"{where}.runAsUser", "is root"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{where}.allowPrivilegeEscalation", "must be false"
    if own.get("privileged"):
        yield f"{where}.privileged", "is not allowed"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()):
        yield f"{where}.capabilities.drop", "must have ALL"
    if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield f"{where}.capabilities.add", f"{capabilities['add']}: only NET_BIND_SERVICE may be added"
    if (seen.get("seccompProfile") or {}).get("type") not in _PROFILES:
        yield f"{where}.seccompProfile.type", f"must be {' or '.join(_PROFILES)}, here or for the pod"
    if own.get("procMount", "Default") != "Default":
        yield f"{where}.procMount", "must be Default"
    for place, port in listed(container, "ports", path):
        if port.get("hostPort"):
            yield f"{place}.hostPort", "takes the node's port"


def image(path: str, container: Object) -> Found:
    """An image that is named, with a tag or a digest that says which."""
    text = container.get("image")
    found = _IMAGE.fullmatch(str(text))
    if found is None:
        yield f"{path}.image", f"{text!r} is no image"
    elif not found["digest"] and found["tag"] in (None, "latest"):
        yield (
            f"{path}.image",
            f"{text}: {'latest is' if found['tag'] else 'no tag means latest:'} another image every day; give a version or a digest",
        )


def _writes(pod: Pod, path: str, container: Object) -> Found:
    """Ray writes its session below /tmp; a read-only root needs something there."""
    if not (container.get("securityContext") or {}).get("readOnlyRootFilesystem"):
        return
    mounts = {mount.get("mountPath"): mount for mount in container.get("volumeMounts") or ()}
    if pod.is_ray and ("/tmp" not in mounts or mounts["/tmp"].get("readOnly")):
        yield f"{path}.volumeMounts", "readOnlyRootFilesystem without a writable volume at /tmp, where Ray writes"
