"""The front: everything that is wrong with manifests, as far as it can be told without a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.infra.kubernetes import bundle, container, core, kuberay, lifetime, literal, monitor, names, security, values
from tests.infra.kubernetes.crd import Definitions
from tests.infra.kubernetes.pod import pods
from tests.infra.kubernetes.problem import Found, Object, join, place

KUBERAY = ("RayJob", "RayCluster")
API_VERSION = "ray.io/v1"
POD_RULES = (container.check, lifetime.check, security.check)
OBJECT_RULES = (literal.check, values.check)


@dataclass(frozen=True, order=True)
class Problem:
    """Something wrong: in which object, where in it, and why."""

    place: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place} {self.path}: {self.reason}"


class _Loader(yaml.CSafeLoader):
    """YAML as a careful reader takes it: a key that is there twice is an error, not the last one."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(text: str) -> list[Object]:
    """The manifests of a YAML stream. Raises yaml.YAMLError."""
    return [thing for thing in yaml.load_all(text, Loader=_Loader) if thing is not None]


def definitions_folder() -> Path:
    """Where KubeRay's resource definitions are to be: beside the repository, or in FACEMAE_SHARED."""
    return Path(os.environ.get("FACEMAE_SHARED", Path(__file__).parents[4] / "shared")) / "kuberay"


@cache
def definitions() -> Definitions | None:
    """KubeRay's resource definitions; None where they are not."""
    files = [definitions_folder() / f"ray.io_{name}.yaml" for name in ("rayjobs", "rayclusters")]
    return Definitions(files) if all(file.is_file() for file in files) else None


def check(objects: Sequence[Any], outside: Iterable[str] = (), *, crd: Definitions | None = None) -> list[Problem]:
    """Everything wrong with objects that are applied together.

    Args:
        objects: manifests.
        outside: ``Kind/name`` (``Kind/*``) of what is in the cluster already.
        crd: KubeRay's definitions; None: its objects are checked by its own rules and as pods only.
    """
    whole = [thing for thing in objects if isinstance(thing, dict) and isinstance(thing.get("metadata"), dict)]
    problems = {
        Problem(f"object {number}", "metadata", "no object of Kubernetes") for number, thing in enumerate(objects) if thing not in whole
    }
    for thing in whole:
        problems |= {Problem(place(thing), path, reason) for path, reason in _alone(thing, crd)}
    try:
        together = list(bundle.check(whole, frozenset(outside)))
    except (AttributeError, TypeError):
        if not problems:  # otherwise the shapes that it stumbled over have been told of
            raise
        together = []
    return sorted(problems | {Problem(place(thing), path, reason) for thing, path, reason in together})


def _alone(thing: Object, crd: Definitions | None) -> Found:
    yield from names.check(thing)
    shapes = list(_schema(thing, crd))
    yield from shapes
    try:
        yield from list(_beyond(thing))
    except (AttributeError, TypeError):
        if not shapes:
            raise


def _schema(thing: Object, crd: Definitions | None) -> Found:
    if thing.get("apiVersion") == monitor.API_VERSION and thing.get("kind") == "PodMonitor":
        yield from monitor.check(thing)
        return
    if thing.get("kind") not in KUBERAY:
        yield from core.check(thing)
        return
    if thing.get("apiVersion") != API_VERSION:
        yield "apiVersion", f"{thing.get('apiVersion')!r}: KubeRay 1.7 keeps {API_VERSION}"
    elif crd is not None:
        yield from crd.check(thing)
    for pod in pods(thing):
        yield from core.check_template(pod)


def _beyond(thing: Object) -> Iterator[tuple[str, str]]:
    if thing.get("kind") in KUBERAY:
        yield from kuberay.check(thing)
    if thing.get("kind") == "RayJob":
        yield from security.check_submission(thing)
    for pod in pods(thing):
        yield from names.check_metadata(pod.template.get("metadata") or {}, join(pod.path, "metadata"))
        for rule in POD_RULES:
            yield from rule(pod)
    for rule_ in OBJECT_RULES:
        yield from rule_(thing)
