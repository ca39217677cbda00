"""Who may speak to whom under the NetworkPolicies of a bundle, by Kubernetes' rules."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.infra.kubernetes.container import selects
from tests.infra.kubernetes.problem import Object

Way = Literal["ingress", "egress"]


@dataclass(frozen=True)
class End:
    """One end of a connection.

    Attributes:
        labels: of its pod; a value of None is known only at run time. Empty for what is no pod.
        namespace: of its pod; None for what is no pod.
        namespace_labels: beside ``kubernetes.io/metadata.name``, which every namespace has.
        address: of what is no pod.
        ports: names of the pod's ports.
    """

    labels: Mapping[str, str | None] = field(default_factory=dict)
    namespace: str | None = None
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None
    ports: Mapping[str, int] = field(default_factory=dict)


def allows(policies: Sequence[Object], source: End, target: End, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection from one end to the other comes about: both sides' policies must let it."""
    return _lets(policies, "egress", source, target, target, port, protocol) and _lets(
        policies, "ingress", target, source, target, port, protocol
    )


def selecting(policies: Sequence[Object], way: Way, end: End) -> Iterator[Object]:
    """The policies that govern one way of a pod."""
    for policy in policies:
        spec = policy.get("spec") or {}
        types = spec.get("policyTypes") or (["Ingress", "Egress"] if "egress" in spec else ["Ingress"])
        home = policy["metadata"].get("namespace")
        if end.namespace is None or (home is not None and home != end.namespace) or way.capitalize() not in types:
            continue
        if selects(spec.get("podSelector") or {}, end.labels):
            yield policy


def _lets(policies: Sequence[Object], way: Way, own: End, other: End, target: End, port: int, protocol: str) -> bool:
    governing = list(selecting(policies, way, own))
    if not governing:
        return True
    for policy in governing:
        for rule in policy["spec"].get(way) or ():
            peers = rule.get("from" if way == "ingress" else "to")
            if _port_fits(rule.get("ports"), target, port, protocol) and (
                not peers or any(_is_peer(peer, own.namespace, other) for peer in peers)
            ):
                return True
    return False


def _port_fits(ports: Sequence[Object] | None, target: End, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for allowed in ports:
        if allowed.get("protocol", "TCP") != protocol:
            continue
        first = allowed.get("port")
        if first is None:
            return True
        low = target.ports.get(first, -1) if isinstance(first, str) else int(first)
        if low <= port <= allowed.get("endPort", low):
            return True
    return False


def _is_peer(peer: Object, home: str | None, other: End) -> bool:
    if "ipBlock" in peer:
        if other.address is None:
            return False
        address = ipaddress.ip_address(other.address)
        block = peer["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(part) for part in block.get("except") or ()
        )
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace} | dict(other.namespace_labels)
        if not selects(peer["namespaceSelector"] or {}, labels):
            return False
    elif other.namespace != home:
        return False
    return "podSelector" not in peer or selects(peer["podSelector"] or {}, other.labels)
