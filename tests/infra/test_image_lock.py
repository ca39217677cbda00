"""The image's run-time lock: a part of the whole one, all that the package imports, and no development package."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "infra" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHER_SYSTEMS = {"tzdata"}  # Windows needs it to run, a development package needs it here


def locked(path: Path) -> dict[str, set[str]]:
    """The pins of a lock, "name==version" -> hashes."""
    found: dict[str, set[str]] = {}
    for block in re.split(r"\n(?=\S)", path.read_text().strip()):
        pin = re.match(r"[\w.-]+==[\w.!+]+", block)
        assert pin, block[:80]
        found.setdefault(pin[0], set()).update(re.findall(r"--hash=(sha256:[0-9a-f]{64})", block))
    return found


def named(text: str) -> str:
    """A distribution's normalised name, at the beginning of a requirement."""
    match = re.match(r"[\w.-]+", text)
    assert match
    return re.sub(r"[-_.]+", "-", match[0]).lower()


RUN_TIME = locked(IMAGE / "requirements.txt")
NAMES = {named(pin) for pin in RUN_TIME}


def test_the_run_time_lock_is_a_part_of_the_whole_one() -> None:
    whole = locked(ROOT / "constraints.txt")
    assert {pin: hashes for pin, hashes in RUN_TIME.items() if whole.get(pin) != hashes} == {}
    assert all(RUN_TIME.values())
    assert {named(each) for each in PROJECT["dependencies"]} <= NAMES


def test_no_development_package_is_in_it() -> None:
    reached = _closure({named(each) for each in PROJECT["dependencies"]})
    assert reached <= NAMES, "all that is installed here and needed to run"
    development = _closure({named(each) for each in PROJECT["optional-dependencies"]["dev"]}) - reached
    assert {"pytest", "mypy", "ruff"} <= development
    assert development & NAMES <= OTHER_SYSTEMS


def _closure(names: set[str]) -> set[str]:
    """Names and all that they require here, without extras."""
    found, todo = (
        set[str](),
        [Requirement(each) for each in [*names, "ray[default,train]"]] if "ray" in names else [*map(Requirement, names)],
    )
    while todo:
        requirement = todo.pop()
        name = named(requirement.name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another system
        if name in found and not requirement.extras:
            continue
        found.add(name)
        for each in map(Requirement, lines):
            extras = ["", *requirement.extras]
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(each)
    return found


def test_every_import_of_the_package_is_locked() -> None:
    owners, ours = metadata.packages_distributions(), {"facemae", "cluster", "jobs"}
    missing = {
        f"{path.relative_to(ROOT)}: {module}"
        for folder in ours
        for path in (ROOT / folder).rglob("*.py")
        for module in _imported(path)
        if module not in ours | sys.stdlib_module_names and not {named(owner) for owner in owners.get(module, [])} & NAMES
    }
    assert missing == set()


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        yield from (name.partition(".")[0] for name in names)
