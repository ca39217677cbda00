"""What is wrong with a pod that has a node, or had one: images, Secrets, memory, crashes, evictions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.kubernetes.refusal import line_of, seconds_of

Object = Mapping[str, Any]

SLOW_SECONDS = 240.0
"""After which a container of Ray's that is not ready is a trouble."""
_PULL = ("ErrImagePull", "ImagePullBackOff")
_START = ("RunContainerError", "StartError", "ContainerCannotRun", "CreateContainerError")
_DENIED = re.compile(r"(?i)unauthorized|authorization failed|access denied|no basic auth|forbidden|denied|may require authorization")
_ABSENT = re.compile(r"(?i)not found|manifest unknown|does not exist|name unknown")
_UNREACHED = re.compile(r"(?i)no such host|i/o timeout|connection refused|dial tcp|x509|tls:|context deadline")
_MISSING = re.compile(r'(?P<kind>secret|configmap) "(?P<name>[^"]+)" not found')
_MISSING_KEY = re.compile(r"couldn't find key (?P<key>\S+) in (?P<kind>Secret|ConfigMap) (?P<name>\S+)")
_LOST = {
    "PreemptionByScheduler": "a pod of higher priority took its place: give the run a higher PriorityClass, if it may have one",
    "DeletionByTaintManager": "its node was tainted, as a spot machine is before it goes",
    "DeletionByPodGC": "its node is gone, as spot machines go",
    "TerminationByKubelet": "its node was shut down or ran short of something",
    "EvictionByEvictionAPI": "it was evicted on purpose, as when a node is drained",
}
_HANDED_OUT = "a worker's shards are handed out again, a head's loss makes a new attempt: nothing to do unless it goes on"


def pod_troubles(pod: Object, events: Sequence[Object], now: float) -> Iterator[str]:
    """Lines about one pod; ``events`` are those of this pod, ``now`` is in seconds since 1970."""
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    namespace = pod["metadata"].get("namespace", "")
    ray_node = bool((pod["metadata"].get("labels") or {}).get("ray.io/cluster"))
    yield from _lost(status)
    for container in (*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])):
        state, last = container.get("state") or {}, container.get("lastState") or {}
        waiting, ended = state.get("waiting") or {}, state.get("terminated") or last.get("terminated") or {}
        look = f"kubectl logs {name} -c {container.get('name')} -n {namespace}{'' if state.get('terminated') else ' --previous'}"
        if waiting.get("reason") in (*_PULL, "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"):
            yield _image(container.get("image", ""), waiting, events)
        elif waiting.get("reason") == "CreateContainerConfigError":
            yield _config(line_of(waiting.get("message")))
        elif waiting.get("reason") in _START or ended.get("reason") in _START:
            message = line_of(waiting.get("message") or ended.get("message"))
            yield f"the container does not start: {message}; is the image facemae's own (infra/image)?"
        elif ended.get("reason") == "OOMKilled":
            yield f"the container {container.get('name')} was killed for want of memory (OOMKilled): a larger --preset, or smaller batches"
        elif waiting.get("reason") == "CrashLoopBackOff" or (ray_node and ended.get("exitCode") and status.get("reason") != "Evicted"):
            yield f"the container {container.get('name')} ended with exit code {ended.get('exitCode', '?')}; see why with: {look}"
        elif ray_node and (running := state.get("running")) and now - seconds_of(running.get("startedAt")) > SLOW_SECONDS:
            yield from _slow(container, events)
    if status.get("phase") == "Pending":
        yield from _mounts(events)


def _slow(container: Object, events: Sequence[Object]) -> Iterator[str]:
    """A container of Ray's that runs for long and is not ready."""
    if container.get("name") == "wait-gcs-ready":
        yield "the worker does not reach the head's port 6379: a NetworkPolicy lets it not, or the head does not start"
    elif not container.get("ready", True):
        why = [line_of(event.get("message")) for event in events if event.get("reason") == "Unhealthy"]
        if why:
            yield f"the container {container.get('name')} runs and is not ready: {why[-1]}"


def _lost(status: Object) -> Iterator[str]:
    """Why the pod lost its node."""
    if status.get("reason") == "Evicted":
        yield f"its node evicted it: {line_of(status.get('message'))}; requests that say what it needs keep it (a larger --preset)"
        return
    if status.get("reason") in ("Preempting", "Shutdown", "NodeShutdown", "Terminated", "NodeLost"):
        yield f"its node went ({status['reason']}); {_HANDED_OUT}"
        return
    for condition in status.get("conditions") or []:
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            why = _LOST.get(condition.get("reason") or "", line_of(condition.get("message") or condition.get("reason")))
            yield f"the pod had to go: {why}; {_HANDED_OUT}"


def _image(image: str, waiting: Object, events: Sequence[Object]) -> str:
    """The state itself often says only that it waits before another try; why is then in an event."""
    why = line_of(waiting.get("message"))
    told = [line_of(event.get("message")) for event in events if "pull" in str(event.get("message")) and event.get("reason") == "Failed"]
    if told and not (_DENIED.search(why) or _ABSENT.search(why) or _UNREACHED.search(why)):
        why = told[-1]
    image = line_of(image) or "the image"
    if waiting.get("reason") == "InvalidImageName":
        return f"{image} is no image name: correct --image"
    if waiting.get("reason") == "ErrImageNeverPull":
        return f"{image} is not on the node and may not be fetched (imagePullPolicy Never): load it there, or change the policy"
    if "toomanyrequests" in why or "rate limit" in why:
        return f"the registry of {image} limits how often it is fetched: wait, or give credentials with --pull-secret NAME"
    if "no match for platform" in why:
        return f"{image} was not built for these nodes' processors: build it for them (docker buildx build --platform)"
    if _DENIED.search(why):  # registries say the same of a private image and of one that is not there
        return (
            f"the registry gives {image} to nobody without credentials, or does not have it: correct --image, or make a Secret "
            "(kubectl create secret docker-registry NAME) and give --pull-secret NAME"
        )
    if _ABSENT.search(why):
        return f"there is no image {image}: correct --image (name and tag), or push it"
    if _UNREACHED.search(why):
        return f"the nodes do not reach the registry of {image}: {why}"
    return f"{image} cannot be fetched: {why or waiting.get('reason')}; correct --image, or give --pull-secret NAME if it is private"


def _config(message: str) -> str:
    if found := _MISSING_KEY.search(message):
        return f"the {found['kind']} {found['name']} has no key {found['key']}: add it"
    if found := _MISSING.search(message):
        return _absent(found)
    if "runAsNonRoot" in message:
        return f"the image would run as root, which the pod forbids: {message}; use facemae's own image (infra/image)"
    return f"the container's configuration cannot be made: {message}"


def _absent(found: re.Match[str]) -> str:
    if found["kind"] == "secret":
        return (
            f"there is no Secret {found['name']} in the namespace: kubectl create secret generic {found['name']} --from-env-file=FILE, or "
            "correct --secret"
        )
    return f"there is no ConfigMap {found['name']} in the namespace: deleted, or the submission broke off; cancel the run and submit again"


def _mounts(events: Sequence[Object]) -> Iterator[str]:
    for event in events:
        message = line_of(event.get("message"))
        if event.get("reason") in ("FailedMount", "FailedAttachVolume"):
            found = _MISSING.search(message)
            yield _absent(found) if found else f"a volume cannot be mounted: {message}"
            return
        if event.get("reason") in ("FailedCreatePodSandBox", "NetworkNotReady"):
            yield f"the node cannot start the pod: {message}; it tries again, and when it goes on the cluster's administrator must look"
            return
