"""Drain one Ray node before it is taken away: ``python -m cluster.drain --grace SECONDS``, the preStop hook of worker pods.

Ray's head is asked to drain the node (reason: preemption). A stage's scheduler notices within seconds: its workers there finish what
they compute, give the rest back uncharged and end, and others are hired elsewhere. When nothing runs on the node any more, Ray ends its
raylet; this program waits for that, at most as long as the grace lasts. A drained node does not come back: a pod whose container starts
again joins as a new node.

Which node: that of the one raylet that runs here. Where several do (several Rays, or several nodes, on one machine), ``--node`` must
say which. Exit codes: 0 the node is drained and gone, 1 the grace is over and it still holds something, 2 it was not drained at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 1.0
RPC_SECONDS = 10.0


class DrainError(ValueError):
    """The node cannot be drained; the message says why and what to do."""


@dataclass(frozen=True)
class Raylet:
    """A raylet that runs on this machine: its node's id, address, and the address of its cluster's head."""

    node: str
    ip: str
    head: str


@dataclass(frozen=True)
class Node:
    """A living node as the head knows it. ``deadline``: seconds until which it drains, 0 without limit, None where it does not."""

    id: str
    ip: str
    is_head: bool
    num_cpus: float
    num_gpus: float
    deadline: float | None

    def __str__(self) -> str:
        state = "draining" if self.deadline is not None else "alive"
        return f"{self.id}  {self.ip:15}  {'head' if self.is_head else 'worker':6}  {self.num_cpus:g} CPU {self.num_gpus:g} GPU  {state}"


class Head:
    """The head of a cluster (Ray's GCS), asked without joining the cluster.

    Raises:
        DrainError: it does not answer, or refuses the token.
    """

    def __init__(self, address: str) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

        self.address = address
        self._gcs: Any = _answered(address, lambda: GcsClient(address=address))

    def nodes(self) -> list[Node]:
        """The nodes that live, by address."""
        from ray.core.generated import gcs_pb2

        known = _answered(self.address, lambda: self._gcs.get_all_node_info(timeout=RPC_SECONDS))
        draining = _answered(self.address, lambda: self._gcs.get_draining_nodes(timeout=RPC_SECONDS))
        found = [
            Node(
                key.hex(),
                info.node_manager_address,
                info.is_head_node,
                info.resources_total.get("CPU", 0.0),
                info.resources_total.get("GPU", 0.0),
                draining[key.hex()] / 1000 if key.hex() in draining else None,
            )
            for key, info in known.items()
            if info.state == gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]  # made when it is imported
        ]
        return sorted(found, key=lambda node: (not node.is_head, node.ip, node.id))

    def drain(self, node: Node, grace: float) -> None:
        """Ask for it. Raises DrainError when the head refuses."""
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
        until = int((time.time() + grace) * 1000)
        message = "facemae: the node is about to be taken away"
        accepted, why = _answered(self.address, lambda: self._gcs.drain_node(node.id, reason, message, until, timeout=RPC_SECONDS))
        if not accepted:
            raise DrainError(f"Ray refuses to drain node {node.id} ({node.ip}): {why}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.drain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grace", type=_seconds, default=60.0, help="seconds that the node has left (60)")
    parser.add_argument("--address", help="HOST:PORT of the cluster's head; else RAY_ADDRESS, else that of the one raylet here")
    parser.add_argument("--node", help="id (8 characters of it are enough) or address of the node, instead of this machine's")
    parser.add_argument("--list", action="store_true", help="only show the cluster's nodes")
    options = parser.parse_args(arguments)
    try:
        raylets = local_raylets()
        head = Head(options.address or os.environ.get("RAY_ADDRESS") or _only_head(raylets))
        if options.list:
            print("\n".join(map(str, head.nodes())))
            return 0
        node = choose(head.nodes(), raylets, options.node)
        head.drain(node, options.grace)
    except DrainError as error:
        print(f"cluster.drain: error: {error}", file=sys.stderr)
        return 2
    print(f"cluster.drain: node {node.id} ({node.ip}) drains, for at most {options.grace:g} s", flush=True)
    return _await_end(head, node, options.grace)


def choose(nodes: Sequence[Node], raylets: Sequence[Raylet], wanted: str | None) -> Node:
    """The node to drain.

    Args:
        nodes: the cluster's.
        raylets: that run on this machine, of any cluster.
        wanted: id or address; None for this machine's node.

    Raises:
        DrainError: none, or more than one, or the head.
    """
    if wanted is not None:
        found = [node for node in nodes if node.ip == wanted or (len(wanted) >= 8 and node.id.startswith(wanted))]
        if not found:
            raise DrainError(f"--node {wanted}: no living node of the cluster has this id or address; there are\n{_listed(nodes)}")
    else:
        here = {raylet.node for raylet in raylets}
        found = [node for node in nodes if node.id in here]
        if not found:
            raise DrainError("no node of the cluster runs on this machine: give --node")
    if len(found) > 1:
        raise DrainError(f"{len(found)} nodes {'are meant' if wanted else 'run on this machine'}: give --node ID, one of\n{_listed(found)}")
    if found[0].is_head:
        raise DrainError(f"node {found[0].id} is the head, without which there is no cluster: only workers can be drained")
    return found[0]


def local_raylets(proc: Path = Path("/proc")) -> list[Raylet]:
    """The raylets that run on this machine, of any cluster, found by their command lines."""
    found = []
    for file in proc.glob("[0-9]*/cmdline"):
        try:
            program, *flags = file.read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):
            continue  # it has ended since
        if Path(program).name == "raylet":
            values = dict(flag.lstrip("-").split("=", 1) for flag in flags if flag.startswith("--") and "=" in flag)
            values = {name.replace("-", "_"): value for name, value in values.items()}
            found.append(Raylet(values.get("node_id", ""), values.get("node_ip_address", ""), values.get("gcs_address", "")))
    return found


def _only_head(raylets: Sequence[Raylet]) -> str:
    heads = sorted({raylet.head for raylet in raylets})
    if not heads:
        raise DrainError("no raylet runs on this machine: give --address HOST:PORT, or set RAY_ADDRESS, and --node")
    if len(heads) > 1:
        raise DrainError(f"{len(heads)} Ray clusters run on this machine: give --address, one of {', '.join(heads)}")
    return heads[0]


def _await_end(head: Head, node: Node, grace: float) -> int:
    """Wait until the node has left the cluster, at most as long as the grace lasts. A head that does not answer is asked again."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline:
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        try:
            if all(other.id != node.id for other in head.nodes()):
                print("cluster.drain: nothing runs on the node any more, and Ray has ended it")
                return 0
        except DrainError as error:
            print(f"cluster.drain: {error}", file=sys.stderr)
    print(f"cluster.drain: after {grace:g} s something still runs on node {node.id}; what it has not committed will be done again")
    return 1


def _answered(address: str, ask: Callable[[], Any]) -> Any:
    """What the head answers; DrainError where it does not."""
    try:
        return ask()
    except Exception as error:  # Ray raises RpcError, RaySystemError, AuthenticationError, plain RuntimeError ...
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DrainError(f"the head at {address} does not answer ({lines[0]}): check --address and Ray's token") from None


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give 0 or more seconds")
    return seconds


def _listed(nodes: Sequence[Node]) -> str:
    return "\n".join(f"  {node}" for node in nodes)


if __name__ == "__main__":
    sys.exit(main())
