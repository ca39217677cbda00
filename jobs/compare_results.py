"""The page of results from recorded ones: every figure on it is in one of the files that it is made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from cluster.store import read_url
from jobs.command import UsageError
from jobs.compare_claim import claim
from jobs.compare_plot import picture
from jobs.compare_row import Block, Record
from jobs.compare_table import failures, markdown, markdown_table

IMAGES = "images"
"""Folder of the pictures, beside the page."""
REPEAT = (
    "Each part says what measured it, and has the commands that repeat it. Real faces and recognisers are not part of this repository; "
    "the tests that use them skip where\nthey are absent."
)


def write_page(results: Sequence[str], output: str) -> list[str]:
    """Write the page and, for each comparison, its picture into ``images/`` beside it.

    Args:
        results: recorded results (JSON), in the order of the page.
        output: the page, a .md file.

    Returns:
        The files written, the page first.

    Raises:
        UsageError: a file is no record, or two have one name, which would name one picture.
        StoreError: a file cannot be read.
    """
    records = {Path(file).stem: Record.from_bytes(read_url(file), file) for file in results}
    if len(records) < len(results):
        raise UsageError(f"two of {', '.join(results)} have the same name: their pictures would be one file; rename one")
    page, written = Path(output), [output]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(records, page.name), encoding="utf-8")
    for name, record in records.items():
        for _, suffix, view in record.views():
            if view.drawn:
                (page.parent / IMAGES).mkdir(exist_ok=True)
                path = page.parent / IMAGES / _picture(name + suffix)
                path.write_bytes(picture(view))
                written.append(str(path))
    return written


def render(records: dict[str, Record], page: str) -> str:
    """The page as markdown: for each record its words, its comparison, its tables and what limits it."""
    made = f"Made from the recorded results beside this page (`facemae compare --results FILE.json ... --output {page}`)"
    made += ": change those, not this."
    parts = ["# What was measured", f"{made}\n{REPEAT}"]
    for name, record in records.items():
        parts += _section(name, record)
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _section(name: str, record: Record) -> Iterator[str]:
    yield f"## {record.title}"
    if origin := _origin(record):
        yield origin
    if record.commands:
        yield code(record.commands)
    if record.rows:
        yield from _comparison(name, record)
    for block in record.blocks:
        yield _block(block)
    if record.notes:
        yield "What limits it:"
        yield "\n".join(f"- {note}" for note in record.notes)


def _origin(record: Record) -> str:
    """Where and when it was measured, in one paragraph."""
    seeds = f"seeds {', '.join(map(str, record.seeds))}" if record.seeds else ""
    commit = f"commit {record.commit}" if record.commit else ""
    found = "; ".join(filter(None, (record.hardware, record.date, commit, seeds)))
    return "\n".join(f"{text}." if not text.endswith(".") else text for text in (found, record.data) if text)


def _comparison(name: str, record: Record) -> Iterator[str]:
    """Table, failures, picture, claim and commands of a comparison."""
    for heading, suffix, view in record.views():
        yield f"### {heading}"
        yield markdown(view)
        if view.drawn:
            yield f"![Leakage against verification error, {heading}: {record.title}]({IMAGES}/{_picture(name + suffix)})"
        yield claim(view)
    if failed := failures(record):
        yield "Not done:"
        yield "\n".join(f"- {line}" for line in failed)
    yield "### How each row was made"
    yield code([line for row in record.rows for line in (f"# {row.name}", *row.commands)])
    settings = {"pretrain": record.recipe, "evaluate": record.evaluation}
    if any(settings.values()):
        yield "The same for every row:"
        yield code(yaml.safe_dump(settings, sort_keys=False, width=140, allow_unicode=True).splitlines())


def _block(block: Block) -> str:
    if block.head:
        return markdown_table(block.head, block.rows)
    return code(block.code) if block.code else block.text


def code(lines: Sequence[str]) -> str:
    """Lines as a block of code, indented."""
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _picture(name: str) -> str:
    return f"pareto-{name}.png"
