"""Every command that README and docs print is one that the jobs understand."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest

from jobs.__main__ import JOBS
from jobs.command import parse

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SCHEMATIC = re.compile(r"\.\.\.|[a-z]\|[a-z]|--config (?!jobs/)|\*\.json| M M M| N\b|=\$\(")
"""What stands for something else: an ellipsis, a choice, a file of the reader's own."""


def commands() -> list[tuple[str, str]]:
    """Page and command, as they are printed in blocks of code; what is optional is given, comments are not."""
    found = dict[tuple[str, str], None]()
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("    facemae ") and not SCHEMATIC.search(line):
                plain = re.sub(r"\s#.*|&&.*|\\$", "", line).translate({ord("["): None, ord("]"): None})
                found[page.name, plain.strip()] = None
    return list(found)


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_printed_command_is_understood(page: str, command: str) -> None:
    _, job, *arguments = shlex.split(re.sub(r"--seed [A-Z]+", "--seed 1", command))
    assert job in JOBS
    kind = next(iter(get_type_hints(importlib.import_module(f"jobs.{job}").run).values()))
    config = parse(kind, arguments, f"facemae {job}")
    lanes, workers = getattr(config, "lanes", 0), getattr(config, "num_workers", 0)
    assert lanes % max(workers, 1) == 0, "the workers must divide the lanes"


def test_there_are_commands_to_look_at() -> None:
    pages = [page for page, _ in commands()]
    assert len(pages) >= 35
    assert {"README.md", "pretrain.md", "compare.md", "leakage.md"} <= set(pages)
