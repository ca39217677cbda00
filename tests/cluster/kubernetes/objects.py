"""Objects as a real cluster shows them."""

from __future__ import annotations

from typing import Any

from tests.cluster.kubernetes.api_server import stamp

Object = dict[str, Any]


def rayjob(name: str = "run", **status: Any) -> Object:
    """A RayJob that KubeRay has taken up when it has a status."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": "faces", "uid": "uid-1", "creationTimestamp": stamp(600)},
        "spec": {"entrypoint": "facemae protect --config /etc/facemae/job.yaml", "backoffLimit": 2},
        **({"status": {"rayClusterName": f"{name}-x7k2p", "jobId": f"{name}-8fq2x", **status}} if status else {}),
    }


def pod(name: str = "run-x7k2p-gpu-worker-abcde", container: Object | None = None, **status: Any) -> Object:
    """A pod of the run's RayCluster."""
    found = {"name": "ray-worker", "image": "registry.example/facemae:1", **container} if container else None
    statuses = {"containerStatuses": [found]} if found else {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "faces", "labels": {"ray.io/cluster": "run-x7k2p", "ray.io/node-type": "worker"}},
        "status": {"phase": "Pending", **statuses, **status},
    }


def waiting(reason: str, message: str = "") -> Object:
    """A container that waits."""
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def unscheduled(message: str, reason: str = "Unschedulable") -> Object:
    """A pod without a node."""
    return pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}])


def event(reason: str, message: str, kind: str = "Pod", name: str = "run-x7k2p-gpu-worker-abcde", *, ago: float = 5, **more: Any) -> Object:
    """An event of the last minute."""
    return {
        "metadata": {"name": f"{name}.17a", "namespace": "faces"},
        "involvedObject": {"kind": kind, "name": name, "namespace": "faces", **more.pop("involved", {})},
        "reason": reason,
        "message": message,
        "type": more.pop("type", "Warning"),
        "lastTimestamp": stamp(ago),
        **more,
    }
