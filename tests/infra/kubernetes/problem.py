"""What a rule finds wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]
"""One manifest, as YAML gives it."""

Found = Iterator[tuple[str, str]]
"""What is wrong in one object: path (``spec.containers[0].image``) and reason."""


def place(thing: Object) -> str:
    """``Kind/name`` of an object."""
    return f"{thing.get('kind')}/{(thing.get('metadata') or {}).get('name')}"


def join(path: str, key: str | int) -> str:
    """The path of a child."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below and including this one, with its path."""
    yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from walk(child, join(path, key))


def listed(holder: Any, key: str, path: str) -> Iterator[tuple[str, Object]]:
    """The members of ``holder[key]`` that are objects, with their paths; nothing where it is absent or no list."""
    members = holder.get(key) if isinstance(holder, dict) else None
    for number, member in enumerate(members if isinstance(members, list) else ()):
        if isinstance(member, dict):
            yield join(join(path, key), number), member


def twice(members: Iterator[tuple[str, Object]], key: str, what: str) -> Found:
    """Members of a list that have the same ``key``."""
    seen: dict[Any, str] = {}
    for path, member in members:
        value = member.get(key)
        if value is None:
            continue
        if value in seen:
            yield join(path, key), f"{what} {value!r} is there twice, see {seen[value]}"
        seen.setdefault(value, path)
