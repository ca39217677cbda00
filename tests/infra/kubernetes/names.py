"""Names, labels and annotations by Kubernetes' rules, which no schema of its objects holds."""

from __future__ import annotations

import re
from typing import Any, Literal

from tests.infra.kubernetes.problem import Found, Object, join

Rule = Literal["dns-1035", "dns-1123", "subdomain"]

_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL_1123.pattern}(\.{_LABEL_1123.pattern})*")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_SHAPES: dict[Rule, tuple[re.Pattern[str], int, str]] = {
    "dns-1035": (_LABEL_1035, 63, "small letters, digits and - only, from a letter to a letter or digit"),
    "dns-1123": (_LABEL_1123, 63, "small letters, digits and - only, from and to a letter or digit"),
    "subdomain": (_SUBDOMAIN, 253, "small letters, digits, - and . only, from and to a letter or digit"),
}
_RULES: dict[str, Rule] = {"Service": "dns-1035", "Namespace": "dns-1123", "RayJob": "dns-1035", "RayCluster": "dns-1035"}
_FREE = {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}
"""Kinds whose name is only part of a path."""

CLUSTER_WIDE = {"Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "StorageClass", "PersistentVolume"}
MAX_ANNOTATIONS = 256 * 1024


def name_problem(name: Any, rule: Rule) -> str | None:
    """Why a name is none; None where it is good."""
    shape, longest, words = _SHAPES[rule]
    if not isinstance(name, str) or not shape.fullmatch(name):
        return f"{name!r} is no name: {words}"
    return f"{name!r} has {len(name)} characters, {longest} are allowed" if len(name) > longest else None


def key_problem(key: Any) -> str | None:
    """Why the key of a label, an annotation or a taint is none."""
    prefix, slash, name = str(key).rpartition("/")
    if slash and name_problem(prefix, "subdomain"):
        return f"the prefix of {key!r} is no DNS subdomain"
    return None if _NAME.fullmatch(name) and len(name) <= 63 else f"{key!r} is no key: at most 63 letters, digits, -, _ and ."


def label_problem(key: Any, value: Any) -> str | None:
    """Why a label is none."""
    if not isinstance(value, str):
        return f"{value!r} is no string: quote it"
    if len(value) > 63 or (value and not _NAME.fullmatch(value)):
        return f"{value!r} is no label's value: at most 63 letters, digits, -, _ and ., from and to a letter or digit"
    return key_problem(key)


def check(thing: Object) -> Found:
    """The names of an object and of what it labels."""
    metadata = thing.get("metadata")
    if not isinstance(metadata, dict):
        yield "metadata", "is required"
        return
    kind = str(thing.get("kind"))
    if kind not in _FREE and (reason := name_problem(metadata.get("name"), _RULES.get(kind, "subdomain"))):
        yield "metadata.name", reason
    if "namespace" in metadata:
        if kind in CLUSTER_WIDE:
            yield "metadata.namespace", f"a {kind} belongs to the whole cluster"
        elif reason := name_problem(metadata["namespace"], "dns-1123"):
            yield "metadata.namespace", reason
    yield from check_metadata(metadata, "metadata")


def check_metadata(metadata: Object, path: str) -> Found:
    """Labels and annotations."""
    for key, value in (metadata.get("labels") or {}).items():
        if reason := label_problem(key, value):
            yield join(join(path, "labels"), key), reason
    annotations = metadata.get("annotations") or {}
    for key, value in annotations.items():
        if reason := key_problem(key) or (None if isinstance(value, str) else f"{value!r} is no string: quote it"):
            yield join(join(path, "annotations"), key), reason
    if sum(len(str(key)) + len(str(value)) for key, value in annotations.items()) > MAX_ANNOTATIONS:
        yield join(path, "annotations"), f"more than {MAX_ANNOTATIONS} bytes"
