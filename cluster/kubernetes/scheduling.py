"""Why a pod finds no node: the scheduler's and the cluster autoscaler's words, explained."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.kubernetes.refusal import line_of

Object = Mapping[str, Any]

_PART = re.compile(r"(?P<nodes>\d+) (?P<why>.+)")
_NODES = re.compile(r"0/(?P<nodes>\d+) nodes are available: ?(?P<parts>.*)", re.DOTALL)
_ASKS = {
    "cpu": "ask for fewer cores (--preset), or let the node group grow",
    "memory": "ask for less memory (--preset), or let the node group grow",
    "ephemeral-storage": "nodes need a larger disk, or the pods a smaller request",
    "nvidia.com/gpu": "GPUs are taken, or no node offers any (is NVIDIA's device plugin installed?): kubectl describe nodes shows them",
    "pods": "the nodes are full of pods: let the node group grow",
}
_REASONS = (
    (
        r"Insufficient (?P<what>\S+)",
        lambda found: f"too little free {found['what']}: {_ASKS.get(found['what'], 'no node has enough of it')}",
    ),
    (r"Too many pods", lambda _: _ASKS["pods"]),
    (
        r"untolerated taint \{(?P<taint>.*)\}",
        lambda found: f"the taint {found['taint']}, which the pod does not tolerate: add a toleration in an overlay, or use other nodes",
    ),
    (
        r"didn't match Pod's node affinity(/selector)?",
        lambda _: "labels that the pod's node selector does not match: kubectl get nodes --show-labels; correct it in the overlay",
    ),
    (r"didn't match pod topology spread", lambda _: "no place under the topology spread: fewer workers, or nodes in more zones"),
    (r"were unschedulable", lambda _: "been cordoned: kubectl uncordon, when their maintenance is over"),
    (
        r"volume node affinity conflict|unbound immediate PersistentVolumeClaims",
        lambda _: "no access to the pod's volume: look at its claim",
    ),
    (r"didn't have free ports", lambda _: "a needed host port taken"),
)


def scheduling_troubles(pod: Object, events: Sequence[Object]) -> Iterator[str]:
    """Lines about a pod that has no node yet; ``events`` are those of this pod."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    waiting = next((each for each in conditions if each.get("type") == "PodScheduled" and each.get("status") == "False"), None)
    if waiting is None:
        return
    if waiting.get("reason") == "SchedulingGated":
        yield "the pod is gated: a queue such as Kueue holds it back until there is room (kubectl get workloads)"
        return
    message = line_of(waiting.get("message"), 2000)
    yield f"no node fits: {_explained(message)}{_growth(events)}"


def _growth(events: Sequence[Object]) -> str:
    """What whoever adds nodes says of it: the cluster autoscaler, or Karpenter."""
    texts = {event.get("reason"): line_of(event.get("message"), 200) for event in events}
    if "TriggeredScaleUp" in texts or "Nominated" in texts:
        return "; a node is being added: wait some minutes"
    for reason in ("FailedScaleUp", "ScaleUpFailed"):
        if reason in texts:
            return f"; adding a node failed ({texts[reason]}): the cloud has no such machine now or your quota there is used up"
    if "NotTriggerScaleUp" in texts:
        return f"; the cluster autoscaler cannot help ({texts['NotTriggerScaleUp']}): raise the node group's maximum, or make one that fits"
    for event in events:
        if event.get("reason") == "FailedScheduling" and "karpenter" in str((event.get("source") or {}).get("component", "")):
            return f"; Karpenter cannot help ({line_of(event.get('message'), 200)}): correct or add a NodePool"
    return ""


def _explained(message: str) -> str:
    found = _NODES.match(message)
    if found is None:
        return message or "the scheduler gives no reason"
    if found["nodes"] == "0":
        return "the cluster has no node at all: let a node group grow"
    parts = found["parts"].partition(" preemption:")[0].strip().rstrip(".")
    words = list[str]()
    for part in re.split(r", (?=\d+ )", parts):
        counted = _PART.match(part)
        if counted is not None:
            words.append(f"{counted['nodes']} of {found['nodes']} nodes have {_reason(counted['why'])}")
    return "; ".join(words) or parts


def _reason(why: str) -> str:
    for pattern, words in _REASONS:
        if found := re.search(pattern, why):
            return words(found)
    return why
