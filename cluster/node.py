"""The nodes of the Ray cluster that this process is connected to, asked of its head."""

from __future__ import annotations

from typing import Any

import ray
import ray._private.state


def is_alive(node: str) -> bool:
    """Whether the node with this id is in the cluster."""
    return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are being drained, by whomever: ``python -m cluster.drain``, an autoscaler, ``ray drain-node``."""
    return frozenset(ray._private.state.state.get_draining_nodes())


def resources() -> dict[str, float]:
    """What all nodes together have of each resource. Unlike ``ray.cluster_resources`` it never starts a Ray where none is connected."""
    return ray._private.state.state.cluster_resources()


def node_of_actor(actor: Any) -> str | None:
    """Id of the node on which an actor runs or ran last, None where it never had one."""
    entry: dict[str, Any] = ray._private.state.actors(actor._actor_id.hex()) or {}
    node = entry.get("Address", {}).get("NodeID") or ""
    return node if node.strip("f") else None  # all f: none yet
