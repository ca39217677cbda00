"""A custom resource against its definition, as the API server does it: defaults, then strict fields and values, then CEL's rules."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import celpy
import yaml

from tests.infra.kubernetes.problem import Found, Object, join

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_BITS = {"int32": 31, "int64": 63}
_KNOWN = {
    "type", "properties", "required", "items", "format", "default", "anyOf", "additionalProperties", "pattern", "enum", "maxLength",
    "minLength", "minimum", "maximum", "minItems", "nullable", "description", "x-kubernetes-list-type", "x-kubernetes-map-type",
    "x-kubernetes-int-or-string", "x-kubernetes-list-map-keys", "x-kubernetes-validations",
}  # fmt: skip


class Definitions:
    """The schemas of custom resource definitions.

    Args:
        files: CustomResourceDefinition manifests.

    Raises:
        ValueError: a schema says something that is not looked at here.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._schemas: dict[tuple[str, str], Object] = {}
        for file in files:
            spec = yaml.load(file.read_bytes(), Loader=yaml.CSafeLoader)["spec"]
            for version in spec["versions"]:
                schema = version["schema"]["openAPIV3Schema"]
                schema["properties"].pop("metadata", None)  # the API server checks it by its own rules: names.py
                _must_be_known(schema, file.name)
                self._schemas[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema

    def __contains__(self, thing: Object) -> bool:
        return (thing.get("apiVersion"), thing.get("kind")) in self._schemas

    def check(self, thing: Object) -> Found:
        """What the API server would refuse of an object, or drop in silence."""
        schema = self._schemas[thing["apiVersion"], thing["kind"]]
        filled = {key: value for key, value in copy.deepcopy(thing).items() if key != "metadata"}
        fill(schema, filled)
        yield from conforms(schema, filled, "")


def _must_be_known(schema: Object, where: str) -> None:
    if strange := set(schema) - _KNOWN:
        raise ValueError(f"{where}: the schema's {sorted(strange)} are not looked at: teach them to {__name__}")
    for child in (*(schema.get("properties") or {}).values(), schema.get("items"), schema.get("additionalProperties")):
        if isinstance(child, dict):
            _must_be_known(child, where)


def fill(schema: Object, value: Any) -> None:
    """Set the defaults of absent fields, in place."""
    if isinstance(value, dict):
        for key, child in (schema.get("properties") or {}).items():
            if key not in value and "default" in child:
                value[key] = copy.deepcopy(child["default"])
        for key, child in value.items():
            fill(_child(schema, key) or {}, child)
    elif isinstance(value, list):
        for child in value:
            fill(schema.get("items") or {}, child)


def _child(schema: Object, key: str) -> Object | None:
    """The schema of a field; None where there is no such field."""
    found = (schema.get("properties") or {}).get(key)
    if found is None and isinstance(schema.get("additionalProperties"), dict):
        found = schema["additionalProperties"]
    return found


def conforms(schema: Object, value: Any, path: str) -> Found:
    """What of a value (with its defaults set) its schema does not allow."""
    if value is None:
        if not schema.get("nullable"):
            yield path, "null: leave the field out"
        return
    if reason := _wrong_type(schema, value):
        yield path, reason
        return
    yield from ((path, reason) for reason in _wrong_value(schema, value))
    if isinstance(value, dict):
        for key in schema.get("required") or ():
            if key not in value:
                yield join(path, key), "is required"
        for key, child in value.items():
            below = _child(schema, key)
            if below is None:
                if "properties" in schema or path == "":
                    yield join(path, key), "no such field: the API server would drop it"
                continue
            yield from conforms(below, child, join(path, key))
    elif isinstance(value, list):
        yield from _repeated(schema, value, path)
        for number, child in enumerate(value):
            yield from conforms(schema.get("items") or {}, child, join(path, number))
    yield from _cel(schema, value, path)


def _wrong_type(schema: Object, value: Any) -> str | None:
    if schema.get("x-kubernetes-int-or-string"):
        return None if isinstance(value, int | str) and not isinstance(value, bool) else f"{value!r} is neither an integer nor a string"
    wanted = schema.get("type")
    if wanted is None:
        return None
    fits = isinstance(value, _TYPES[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
    return None if fits else f"{value!r:.60} is not of type {wanted}"


def _wrong_value(schema: Object, value: Any) -> Iterable[str]:
    if "enum" in schema and value not in schema["enum"]:
        yield f"{value!r} is none of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{value!r} does not match {schema['pattern']}"
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield f"{value!r:.60} has {len(value)} characters"
    if isinstance(value, int | float) and not isinstance(value, bool):
        bits = _BITS.get(schema.get("format", ""))
        low = schema.get("minimum", -(2**bits) if bits else value)
        high = schema.get("maximum", 2**bits - 1 if bits else value)
        if not low <= value <= high:
            yield f"{value} is outside {low} to {high}"
    if isinstance(value, list) and len(value) < schema.get("minItems", 0):
        yield f"has {len(value)} members, {schema['minItems']} are needed"


def _repeated(schema: Object, members: list[Any], path: str) -> Found:
    kind = schema.get("x-kubernetes-list-type")
    if kind not in ("map", "set"):
        return
    keys = schema.get("x-kubernetes-list-map-keys")
    seen = []
    for number, member in enumerate(members):
        identity = [member.get(key) for key in keys] if keys and isinstance(member, dict) else member
        if identity in seen:
            yield join(path, number), f"{identity} is there twice"
        seen.append(identity)


_ENVIRONMENT = celpy.Environment()
_PROGRAMS: dict[str, celpy.Runner] = {}


def _cel(schema: Object, value: Any, path: str) -> Found:
    """CEL's rules for a new object: those that compare with the old one are for updates."""
    for rule in schema.get("x-kubernetes-validations") or ():
        text = rule["rule"]
        if "oldSelf" in text:
            continue
        if text not in _PROGRAMS:
            _PROGRAMS[text] = _ENVIRONMENT.program(_ENVIRONMENT.compile(text))
        try:
            holds = bool(_PROGRAMS[text].evaluate({"self": celpy.json_to_cel(value)}))
        except celpy.CELEvalError as error:
            yield path, f"{text}: {error}"
            continue
        if not holds:
            yield path, rule.get("message", text)
