"""Small CSV tables with a header, from strangers: columns by name, and errors that name the line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence


class TableError(ValueError):
    """A table that cannot be read; the message names the file, the line and the remedy."""


def header(text: str) -> set[str]:
    """The names in the first line."""
    return {name.strip() for name in text.lstrip("\ufeff").partition("\n")[0].split(",")}


def read_table(text: str, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Place and values of each row, required columns first; an optional column that is absent is empty, others are passed over.

    Raises:
        TableError: a required column or value is missing, there is no row, or it is no CSV.
    """
    reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff"), newline=""), restval="", skipinitialspace=True)
    rows, wanted = 0, (*required, *optional)
    try:
        columns = {name.strip(): name for name in reader.fieldnames or () if name}
        if not columns.keys() >= set(required):
            raise TableError(f"{where}: the CSV needs the columns {','.join(required)}, it has {','.join(columns)[:200]}")
        for rows, row in enumerate(reader, 1):  # noqa: B007  # counted for what follows
            place = f"{where}, line {reader.line_num}"
            values = tuple(row[columns[name]].strip() if name in columns else "" for name in wanted)
            if not all(values[: len(required)]):
                raise TableError(f"{place}: {', '.join(required)} must not be empty")
            yield place, values
    except csv.Error as error:
        raise TableError(f"{where}, line {reader.line_num}: no CSV: {error}") from None
    if not rows:
        raise TableError(f"{where} holds no row")
