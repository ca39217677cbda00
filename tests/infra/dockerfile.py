"""A Dockerfile as tests look at it: its stages' instructions, its arguments' defaults, and what its .dockerignore lets through."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Instruction:
    """One instruction: its stage ("" before the first FROM), its name in capitals, and the rest with continued lines joined."""

    stage: str
    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value as a shell splits it, without --options."""
        return [word for word in shlex.split(self.value) if not word.startswith("--")]

    def option(self, name: str) -> str | None:
        """The value of --name=..., None where it is not given."""
        found = re.search(rf"(?:^|\s)--{name}=(\S+)", self.value)
        return found[1] if found else None


def parse(text: str) -> list[Instruction]:
    """All instructions in their order. Comments are left out, within continued lines too."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found, stage = list[Instruction](), ""
    for logical in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not logical.strip():
            continue
        name, _, value = logical.strip().partition(" ")
        if name.upper() == "FROM":
            stage = value.split()[-1]
        found.append(Instruction(stage, name.upper(), value.strip()))
    return found


def arguments(instructions: list[Instruction]) -> dict[str, str]:
    """Every ARG with a default."""
    pairs = [each.value.partition("=") for each in instructions if each.name == "ARG" and "=" in each.value]
    return {name: value.strip('"') for name, _, value in pairs}


def let_through(rules: str, path: str) -> bool:
    """Whether a .dockerignore sends a path to the builder: the last rule that fits it, or a folder above it, counts."""
    sent = True
    for line in rules.splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        again, pattern = rule.startswith("!"), rule.removeprefix("!").strip("/")
        parts = PurePosixPath(path).parts
        if any(_fits(pattern, "/".join(parts[:end])) for end in range(1, len(parts) + 1)):
            sent = again
    return sent


def _fits(pattern: str, path: str) -> bool:
    """Go's filepath.Match, with ** for any number of folders."""
    expression = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    expression = re.sub(r"\\\[(.*?)\\\]", r"[\1]", expression)
    return re.fullmatch(expression, path) is not None


def read(path: Path) -> list[Instruction]:
    """See `parse`."""
    return parse(path.read_text())
