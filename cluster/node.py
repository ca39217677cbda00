"""The nodes of the Ray cluster that this process is connected to, asked of its head."""

from __future__ import annotations

from typing import Any

import ray
import ray._private.state
import ray.util.client


def is_alive(node: str) -> bool:
    """Whether the node with this id is in the cluster."""
    return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())


def num_working() -> int:
    """How many nodes offer a core, at least one: the head of a cluster on Kubernetes offers none."""
    return max(1, sum(bool(entry["Alive"] and entry["Resources"].get("CPU")) for entry in ray.nodes()))


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are being drained, by whomever: ``python -m cluster.drain``, an autoscaler, ``ray drain-node``. A driver that
    is connected through Ray's client server cannot see them: none."""
    return frozenset() if _by_client() else frozenset(ray._private.state.state.get_draining_nodes())


def resources() -> dict[str, float]:
    """What all nodes together have of each resource; nothing where no Ray is connected (asked then, Ray would start one)."""
    return ray.cluster_resources() if ray.is_initialized() else {}


def node_of_actor(actor: Any) -> str | None:
    """Id of the node on which an actor runs or ran last, None where it never had one or it cannot be seen."""
    if _by_client():
        return None
    entry: dict[str, Any] = ray._private.state.actors(actor._actor_id.hex()) or {}
    node = entry.get("Address", {}).get("NodeID") or ""
    return node if node.strip("f") else None  # all f: none yet


def _by_client() -> bool:
    """Whether this driver is connected through Ray's client server (``ray://``)."""
    return ray.util.client.ray.is_connected()
