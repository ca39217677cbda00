"""Why a run does not start, or lost a part of itself: findings from its RayJob, pods and events, each one line with reason and remedy.

The rules were written from the words of Kubernetes, KubeRay 1.7 and the cluster autoscaler, and are tested with objects made like
theirs; no cluster ever said them to this code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cluster.kubernetes.pod_trouble import pod_troubles
from cluster.kubernetes.refusal import INSTALL_KUBERAY, explain_forbidden, line_of, seconds_of
from cluster.kubernetes.scheduling import scheduling_troubles

Object = Mapping[str, Any]

UNTOUCHED_SECONDS = 60.0
"""Within which KubeRay writes a status into a new RayJob, when it runs at all."""
EVENT_SECONDS = 1800.0
"""Age up to which an event still tells of now."""
_VALIDATION = re.compile(r"Invalid(RayJob|RayCluster)(Spec|Status|Metadata)")
_DEADLINES = {
    "DeadlineExceeded": (
        "the run took longer than its activeDeadlineSeconds: what is committed stays; submit again with more time, and it goes on there"
    ),
    "PreRunningDeadlineExceeded": (
        "the machines were not there in time (preRunningDeadlineSeconds): see the other findings, or submit with fewer workers or more time"
    ),
}


def findings(rayjob: Object, pods: Sequence[Object], events: Sequence[Object], now: float) -> tuple[str, ...]:
    """What is wrong, the nearest cause first; the same trouble of several pods is one line.

    Args:
        rayjob: the RayJob.
        pods: of its RayCluster and its submitter.
        events: of its namespace; others' are left out here.
        now: the server's time, in seconds since 1970.
    """
    mine = [event for event in events if _concerns(event, rayjob, pods) and now - event_seconds(event) < EVENT_SECONDS]
    counted: dict[str, list[str]] = {}
    for text, name in (*_of_rayjob(rayjob, now), *_of_pods(pods, mine, now), *_of_events(mine), *_of_conditions(rayjob)):
        names = counted.setdefault(text, [])
        if name and name not in names:
            names.append(name)
    return tuple(_line(text, names) for text, names in counted.items())


def event_seconds(event: Object) -> float:
    """When an event was last seen, in seconds since 1970; 0 where it does not say."""
    stamp = (event.get("series") or {}).get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return seconds_of(stamp or (event.get("metadata") or {}).get("creationTimestamp"))


def _line(text: str, names: Sequence[str]) -> str:
    if not names:
        return text
    return f"{text} (pod {names[0]})" if len(names) == 1 else f"{text} (several pods, {names[0]} among them)"


def _concerns(event: Object, rayjob: Object, pods: Sequence[Object]) -> bool:
    """Whether an event speaks of this run's RayJob, cluster, submitter or pods, and not of an earlier run of the same name."""
    object_, metadata = event.get("involvedObject") or {}, rayjob["metadata"]
    name = object_.get("name", "")
    if object_.get("kind") == "RayJob":
        return name == metadata["name"] and object_.get("uid", metadata.get("uid")) == metadata.get("uid")
    if object_.get("kind") == "Job":
        return name == metadata["name"] and event_seconds(event) >= seconds_of(metadata.get("creationTimestamp"))
    cluster = (rayjob.get("status") or {}).get("rayClusterName")
    known = {pod["metadata"]["name"] for pod in pods}
    return name in known or (bool(cluster) and (name == cluster or name.startswith(f"{cluster}-")))


def _of_rayjob(rayjob: Object, now: float) -> Iterator[tuple[str, str]]:
    status, spec = rayjob.get("status") or {}, rayjob.get("spec") or {}
    age = now - seconds_of(rayjob["metadata"].get("creationTimestamp"))
    deployment = status.get("jobDeploymentStatus") or ""
    if not deployment and not spec.get("suspend") and age > UNTOUCHED_SECONDS:
        manager = spec.get("managedBy")
        if manager and manager != "ray.io/kuberay-operator":
            yield f"{manager} manages this RayJob, not KubeRay, and has not taken it up: look at its queue", ""
        else:
            yield (
                f"KubeRay's operator has not touched the RayJob in more than a minute: does it run, and watch this namespace? kubectl get "
                f"pods -A -l app.kubernetes.io/name=kuberay-operator; to install it: {INSTALL_KUBERAY}",
                "",
            )
    elif deployment in ("", "Suspended") and spec.get("suspend"):
        yield (
            "the RayJob is suspended: a queue such as Kueue holds it back until there is room (kubectl get workloads), or it was suspended "
            f'by hand (kubectl patch rayjob {rayjob["metadata"]["name"]} --type merge -p \'{{"spec":{{"suspend":false}}}}\')',
            "",
        )
    if deployment == "ValidationFailed":
        yield _invalid(line_of(status.get("message"))), ""
    if reason := _DEADLINES.get(status.get("reason") or ""):
        yield reason, ""


def _of_pods(pods: Sequence[Object], events: Sequence[Object], now: float) -> Iterator[tuple[str, str]]:
    for pod in pods:
        name = pod["metadata"]["name"]
        about = [event for event in events if (event.get("involvedObject") or {}).get("name") == name]
        for text in (*pod_troubles(pod, about, now), *scheduling_troubles(pod, about)):
            yield text, name


def _of_events(events: Iterable[Object]) -> Iterator[tuple[str, str]]:
    """Events of what makes pods, for there is no pod yet that could tell; of each trouble the newest."""
    told = set[str]()
    for text in _event_texts(events):
        if (trouble := text.partition(": ")[0]) not in told:
            told.add(trouble)
            yield text, ""


def _event_texts(events: Iterable[Object]) -> Iterator[str]:
    for event in sorted(events, key=event_seconds, reverse=True):
        object_, reason, message = event.get("involvedObject") or {}, event.get("reason") or "", line_of(event.get("message"))
        if object_.get("kind") == "Pod" or event.get("type") != "Warning":
            continue
        if "forbidden" in message:
            yield explain_forbidden(message, reason, str(object_.get("namespace") or ""))
        elif _VALIDATION.fullmatch(reason) or "validation" in reason.lower():
            yield _invalid(message)
        elif "RedisCleanup" in reason or "NotFound" in reason:
            continue  # on the way out, and nothing that a user could do
        elif reason.startswith("Failed"):
            yield f"KubeRay could not do a step ({reason}): {message}; it tries again"


def _of_conditions(rayjob: Object) -> Iterator[tuple[str, str]]:
    """KubeRay's own account of pods that could not be made; the events of it may have been forgotten."""
    cluster = (rayjob.get("status") or {}).get("rayClusterStatus") or {}
    for condition in cluster.get("conditions") or []:
        message = line_of(condition.get("message"))
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True" and "forbidden" in message:
            yield explain_forbidden(message, "create pods", str(rayjob["metadata"].get("namespace") or "")), ""


def _invalid(message: str) -> str:
    return (
        f"KubeRay refuses the RayJob: {message}; this facemae writes it for KubeRay 1.7: install that version, or take your own change back"
    )
