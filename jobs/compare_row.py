"""What a comparison found, as plain data: one row for each (protection, strength), and the record of the whole."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pydantic

from facemae.recognizer.pixels import PIXELS
from jobs.command import UsageError

SCHEMA = 1
REFERENCE = "none"
"""The method of the real set: decoded and encoded as every other, and not protected."""
OURS = "facemae"
"""The method that the claim is about."""


@dataclass(frozen=True)
class Traced:
    """What one attacker finds at rank 1: a share in [0, 1] and its 95 % interval."""

    attacker: str
    cmc1: float
    low: float
    high: float


def _recognizers(found: Sequence[Traced]) -> list[Traced]:
    """Without ``pixels``, plain and adapted."""
    return [each for each in found if each.attacker.partition(" (")[0] != PIXELS]


@dataclass(frozen=True)
class Row:
    """One (protection, strength).

    Attributes:
        name: of the cell, and of its folder.
        method, strength: the protection; None where it has no dial, or was left at its own.
        leakage: every attacker, adaptive ones too, on the same image; the worst one leads. Empty where it was not measured.
        identity: the same for another image of the person, the same order; only attackers that could be asked.
        utility: another image of the person, searched in the protected set itself; plain attackers alone.
        errors: protocol -> seed of the recogniser -> 100 - accuracy, in %.
        commands: what makes this row by hand.
        failed: what was not done, and why.
    """

    name: str
    method: str
    strength: float | None = None
    leakage: list[Traced] = field(default_factory=list)
    identity: list[Traced] = field(default_factory=list)
    utility: list[Traced] = field(default_factory=list)
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def worst(self) -> Traced | None:
        """The attacker that traces most."""
        return self.leakage[0] if self.leakage else None

    @property
    def series(self) -> str:
        """The name without the strength: what one turn of the dial leads along."""
        return self.name if self.strength is None else self.name.removesuffix(f"-{self.strength:g}")

    def error(self, protocol: str) -> float | None:
        """Mean of the seeds, in %; None where there is none."""
        found = self.errors.get(protocol)
        return statistics.fmean(found.values()) if found else None

    def spread(self, protocol: str) -> float:
        """Standard deviation of the seeds (n - 1), in %; 0 of one seed, which says nothing of it."""
        found = self.errors.get(protocol, {})
        return statistics.stdev(found.values()) if len(found) > 1 else 0.0


@dataclass(frozen=True)
class Block:
    """A paragraph, lines of code or a table of a page of results: exactly one of them is given.

    Attributes:
        text: a paragraph of markdown.
        code: commands.
        head, rows: a table; every row as long as the head.
    """

    text: str = ""
    code: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if sum(map(bool, (self.text, self.code, self.head))) != 1:
            raise ValueError("a block is one of text, code and head with rows")
        if any(len(row) != len(self.head) for row in self.rows):
            raise ValueError(f"a row of the table {self.head} is of another length")


@dataclass(frozen=True)
class Record:
    """Recorded results: a comparison where there are rows, and any tables and words.

    Attributes:
        title: heading of its part of the page.
        hardware, date, commit: what measured it, when (ISO), and by which code.
        seeds: of the recognisers.
        data: sets and how many images and people they hold, in words.
        recipe, evaluation: sections of the configuration: the same for every row.
        commands: what makes all of it.
        rows: the comparison.
        blocks: tables (an ablation, say) and words, in order.
        notes: what limits it.
    """

    title: str
    hardware: str = ""
    date: str = ""
    commit: str = ""
    seeds: list[int] = field(default_factory=list)
    data: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def protocols(self) -> list[str]:
        """Names of all protocols, in the order of the first row that has each."""
        return list(dict.fromkeys(name for row in self.rows for name in row.errors))

    @property
    def drawn(self) -> bool:
        """Whether there is a point for a picture."""
        return any(row.worst and row.errors for row in self.rows)

    def reference(self) -> Row | None:
        """The real set's row."""
        return next((row for row in self.rows if row.method == REFERENCE), None)

    def views(self) -> Iterator[tuple[str, str, Record]]:
        """Heading, suffix of the picture's name, and record: by the worst of all attackers, and, where `pixels` took part, by recognisers
        alone, as the paper attacks."""
        yield "By the worst attacker", "", self
        rows = [
            replace(row, leakage=_recognizers(row.leakage), identity=_recognizers(row.identity), utility=_recognizers(row.utility))
            for row in self.rows
        ]
        if rows != self.rows:
            yield "By recognisers alone, as the paper attacks", "-recognizers", replace(self, rows=rows)

    def to_bytes(self) -> bytes:
        """The record as the JSON that is stored."""
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Record:
        """The inverse. Raises UsageError naming ``where`` and the field for anything that is no such record."""
        try:
            content = json.loads(data)
            schema = content.pop("schema")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{where} is no record of a comparison ({error!r}): give a compare.json that facemae compare wrote") from None
        if schema != SCHEMA:
            raise UsageError(f"{where} is of schema {schema}, this version reads {SCHEMA}: run facemae compare again")
        try:
            record = _STRICT.validate_python(content)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if not all(math.isfinite(error) for row in record.rows for found in row.errors.values() for error in found.values()):
            raise UsageError(f"{where}: an error that is no finite number")
        return record


_STRICT = pydantic.TypeAdapter(Record)
