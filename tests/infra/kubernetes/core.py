"""Kubernetes' own kinds against its OpenAPI schema, strictly: unknown fields are refused, and so is null."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import jsonschema
from kubernetes_validate.utils import SchemaNotFoundError, schema_contents
from referencing import Registry, Resource

from tests.infra.kubernetes.pod import Pod
from tests.infra.kubernetes.problem import Found, Object, join, walk

VERSION = "1.34"
_FOLDER = f"kubernetes-json-schema/v{VERSION}.0-local-strict"


_FORMATS = jsonschema.FormatChecker(formats=())
for _name, _bits in (("int32", 31), ("int64", 63)):
    _FORMATS.checks(_name)(lambda value, high=2**_bits: not isinstance(value, int) or -high <= value < high)


@cache
def _definitions() -> Registry[Any]:
    return Resource.from_contents(schema_contents(f"{_FOLDER}/_definitions.json", VERSION)) @ Registry()


@cache
def _validator(api_version: str, kind: str) -> Any:
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)  # rbac.authorization.k8s.io/v1 -> rbac-v1
    try:
        schema = schema_contents(f"{_FOLDER}/{kind.lower()}-{name}.json", VERSION)
    except FileNotFoundError:
        raise SchemaNotFoundError(kind, VERSION, api_version) from None
    registry = Resource.from_contents(schema) @ _definitions()
    return jsonschema.Draft202012Validator(schema, registry=registry, format_checker=_FORMATS)


def check(thing: Object) -> Found:
    """What Kubernetes' schema refuses of an object, and null."""
    try:
        validator = _validator(str(thing.get("apiVersion")), str(thing.get("kind")))
    except SchemaNotFoundError:
        yield "kind", f"Kubernetes {VERSION} has no {thing.get('apiVersion')} {thing.get('kind')}"
        return
    for path, value in walk(thing):
        if value is None:
            yield path, "null: leave the field out"
    for error in validator.iter_errors(thing):
        path = ""
        for key in error.absolute_path:
            path = join(path, key)
        yield path, error.message[:200]


def check_template(pod: Pod) -> Found:
    """A template inside another object as the pod it becomes."""
    if not isinstance(pod.template.get("spec"), dict):
        yield pod.spec_path, "is required"
        return
    as_pod = {"apiVersion": "v1", "kind": "Pod"} | pod.template
    yield from ((join(pod.path, path) if path else pod.path, reason) for path, reason in check(as_pod))
