"""Which actor is asked for what: a query goes only to the owners of the cells that it probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Route:
    """What one owner is asked.

    Attributes:
        owner: its number.
        queries: int64 (R,), numbers of the queries, ascending.
        cells: int32 (R, P), the cells of this owner that each of them probes, packed to the left, -1 behind them.
    """

    owner: int
    queries: np.ndarray
    cells: np.ndarray


def route(probes: np.ndarray, owner_of_cell: np.ndarray) -> Iterator[Route]:
    """Divide the probed cells, int32 (Q, P), among their owners, int (C,); owners that nobody asks are left out."""
    owners = owner_of_cell[probes]
    for owner in np.unique(owners):
        mine = owners == owner
        queries = np.flatnonzero(mine.any(axis=1))
        mine = mine[queries]
        width = int(mine.sum(axis=1).max())
        first = np.argsort(~mine, axis=1, kind="stable")[:, :width]
        cells = np.take_along_axis(np.where(mine, probes[queries], -1), first, 1)
        yield Route(int(owner), queries, cells.astype(np.int32))


def by_cell(cells: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The other way round: each cell of int32 (R, P), -1 for none, with the rows that probe it, int64 ascending."""
    rows, columns = np.nonzero(cells >= 0)
    probed = cells[rows, columns]
    order = np.argsort(probed, kind="stable")
    edges = np.flatnonzero(np.diff(probed[order])) + 1
    for group in np.split(order, edges) if len(order) else ():
        yield int(probed[group[0]]), rows[group]


def request_bytes(routes: Sequence[Route], dim: int, num_thresholds: int, k: int, item: int = 2) -> int:
    """Bytes that a search sends and gets back: vectors, cells and thresholds there; similarities, ids, counts back."""
    there = sum(r.cells.size * 4 + len(r.queries) * (dim * item + num_thresholds * 4) for r in routes)
    back = sum(len(r.queries) * (k * 12 + num_thresholds * 8 + 8) for r in routes)
    return there + back
