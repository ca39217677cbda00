"""What objects that are applied together must agree on: names they refer to, selectors, no object twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tests.infra.kubernetes.container import selects
from tests.infra.kubernetes.names import CLUSTER_WIDE
from tests.infra.kubernetes.pod import Pod, pods
from tests.infra.kubernetes.problem import Object, join, listed, place, walk

BUILT_IN = {
    "PriorityClass/system-cluster-critical",
    "PriorityClass/system-node-critical",
    "ServiceAccount/default",
    "ConfigMap/kube-root-ca.crt",
}
Finding = Iterator[tuple[Object, str, str]]
"""Object, path, reason."""


def check(objects: Sequence[Object], outside: frozenset[str]) -> Finding:
    """What does not fit together.

    Args:
        objects: everything that is applied at once.
        outside: ``Kind/name`` of what is in the cluster already; ``Kind/*`` for any of a kind.
    """
    yield from _twice(objects)
    held = {_identity(thing): thing for thing in objects}
    for thing in objects:
        for path, kind, name, key in references(thing):
            namespace = None if kind in CLUSTER_WIDE else thing["metadata"].get("namespace")
            named = held.get((kind, namespace, name))
            if named is None and not outside & {f"{kind}/{name}", f"{kind}/*"} and f"{kind}/{name}" not in BUILT_IN:
                yield thing, path, f"there is no {kind} {name!r} here, nor is it said to be in the cluster already"
            if named is not None and key is not None and not _has(named, key):
                yield thing, path, f"the {kind} {name!r} has no key {key!r}"
    every = [(thing, pod) for thing in objects for pod in pods(thing)]
    yield from _selectors(objects, every)


def _identity(thing: Object) -> tuple[str, str | None, str]:
    kind = str(thing.get("kind"))
    return kind, None if kind in CLUSTER_WIDE else thing["metadata"].get("namespace"), str(thing["metadata"].get("name"))


def _twice(objects: Sequence[Object]) -> Finding:
    seen = set()
    for thing in objects:
        if _identity(thing) in seen:
            yield thing, "metadata.name", f"{place(thing)} is there twice"
        seen.add(_identity(thing))


def _has(named: Object, key: str) -> bool:
    return any(key in (named.get(part) or {}) for part in ("data", "binaryData", "stringData"))


def references(thing: Object) -> Iterator[tuple[str, str, str, str | None]]:
    """Path, kind, name and (where it matters) key of every object that one needs."""
    for pod in pods(thing):
        yield from _of_pod(pod)
    for path, value in walk(thing.get("spec") or {}, "spec"):
        if isinstance(value, dict):
            yield from _of_value(path, value)
    yield from _of_binding(thing)


def _of_pod(pod: Pod) -> Iterator[tuple[str, str, str, str | None]]:
    spec, path = pod.spec, pod.spec_path
    for key, kind in (("serviceAccountName", "ServiceAccount"), ("priorityClassName", "PriorityClass")):
        if spec.get(key):
            yield join(path, key), kind, spec[key], None
    for where, pull in listed(spec, "imagePullSecrets", path):
        yield f"{where}.name", "Secret", str(pull.get("name")), None
    for where, volume in listed(spec, "volumes", path):
        for key, kind, field in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName")):
            source = volume.get(key)
            if isinstance(source, dict) and not source.get("optional"):
                items = [item.get("key") for item in source.get("items") or ()] or [None]
                yield from ((f"{where}.{key}.{field}", kind, str(source.get(field)), item) for item in items)
        for spot, source in listed(volume.get("projected"), "sources", f"{where}.projected"):
            for key, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
                if isinstance(part := source.get(key), dict) and not part.get("optional"):
                    yield f"{spot}.{key}.name", kind, str(part.get("name")), None
        if isinstance(claim := volume.get("persistentVolumeClaim"), dict):
            yield f"{where}.persistentVolumeClaim.claimName", "PersistentVolumeClaim", str(claim.get("claimName")), None


def _of_value(path: str, value: Object) -> Iterator[tuple[str, str, str, str | None]]:
    for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret"), ("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
        source = value.get(key)
        if isinstance(source, dict) and not source.get("optional"):
            yield f"{join(path, key)}.name", kind, str(source.get("name")), source.get("key")


def _of_binding(thing: Object) -> Iterator[tuple[str, str, str, str | None]]:
    if thing.get("kind") not in ("RoleBinding", "ClusterRoleBinding"):
        return
    role = thing.get("roleRef") or {}
    yield "roleRef.name", str(role.get("kind")), str(role.get("name")), None
    for path, subject in listed(thing, "subjects", ""):
        if subject.get("kind") == "ServiceAccount" and subject.get("namespace") == thing["metadata"].get("namespace"):
            yield f"{path}.name", "ServiceAccount", str(subject.get("name")), None


def _selectors(objects: Sequence[Object], every: Sequence[tuple[Object, Pod]]) -> Finding:
    def selected(thing: Object, selector: Object) -> list[Pod]:
        home = thing["metadata"].get("namespace")
        return [pod for owner, pod in every if owner["metadata"].get("namespace") == home and selects(selector, pod.labels)]

    for thing in objects:
        spec, kind = thing.get("spec") or {}, thing.get("kind")
        if kind == "NetworkPolicy" and not selected(thing, spec.get("podSelector") or {}):
            yield thing, "spec.podSelector", "selects no pod of what is applied here"
        if kind == "NetworkPolicy":
            for way, end in (("ingress", "from"), ("egress", "to")):
                for where, rule in listed(spec, way, "spec"):
                    for path, peer in listed(rule, end, where):
                        if "podSelector" in peer and "namespaceSelector" not in peer and not selected(thing, peer["podSelector"] or {}):
                            yield thing, f"{path}.podSelector", "selects no pod of what is applied here"
        if kind == "PodDisruptionBudget" and not selected(thing, spec.get("selector") or {}):
            yield thing, "spec.selector", "selects no pod of what is applied here"
        if kind == "Service" and spec.get("selector"):
            behind = selected(thing, {"matchLabels": spec["selector"]})
            if not behind:
                yield thing, "spec.selector", "selects no pod of what is applied here"
            yield from ((thing, path, reason) for path, reason in _named_ports(spec, behind))


def _named_ports(spec: Object, behind: Sequence[Pod]) -> Iterator[tuple[str, str]]:
    names = {port.get("name") for pod in behind for _, container in pod.containers() for port in container.get("ports") or ()}
    for where, port in listed(spec, "ports", "spec"):
        if isinstance(port.get("targetPort"), str) and port["targetPort"] not in names:
            yield f"{where}.targetPort", f"no container behind it has a port {port['targetPort']!r}"
