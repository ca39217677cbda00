"""First half of building an index: embedding shards sorted by part, so that a part can be gathered by reading only its rows of each.

A shard of this intermediate set is parquet with one row group a part; it is deleted when the index is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.cell_rows import CellRows, write_groups
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedded import read_shard
from cluster.embedding import Embeddings
from cluster.processor import Processor, Unit
from cluster.quantizer import Quantizer

GROUP_BYTES = 48 << 20
"""Embedding shards are taken together up to this size, so that what a part reads of each is worth a request."""


@dataclass(frozen=True)
class CellsUnit(Unit):
    """Some embedding shards: names and global numbers of their first images."""

    slots: tuple[tuple[str, int], ...] = ()


def cells_units(names: Sequence[str], starts: np.ndarray, dim: int) -> list[CellsUnit]:
    """Consecutive embedding shards in groups of up to GROUP_BYTES. ``starts``: int64 (len(names) + 1,)."""
    units = list[CellsUnit]()
    first = 0
    for last in range(1, len(names) + 1):
        if last == len(names) or (starts[last + 1] - starts[first]) * dim * 2 > GROUP_BYTES:
            slots = tuple((names[i], int(starts[i])) for i in range(first, last))
            units.append(CellsUnit(f"{len(units):05d}", int(starts[last] - starts[first]), slots))
            first = last
    return units


class CellsProcessor(Processor[CellsUnit]):
    """Sorts embeddings by part.

    Args:
        embeddings_url: the data set of embedding shards, of length ``dim``.
        quantizer: as bytes.
        description: what determined it.
    """

    def __init__(self, embeddings_url: str, dim: int, quantizer: bytes, description: Mapping[str, object]) -> None:
        self._url, self._dim, self._quantizer, self._description = embeddings_url, dim, quantizer, dict(description)

    def describe(self) -> dict[str, object]:
        """The index's description."""
        return {"stage": "cells", **self._description}

    def open(self, threads: int) -> None:
        """Load the quantiser."""
        import faiss

        faiss.omp_set_num_threads(threads)
        self._dataset = Dataset(self._url, ".parquet")
        self._cells = Quantizer.from_bytes(self._quantizer, f"{self._url}: the quantiser of its index")

    def fetch(self, unit: CellsUnit) -> list[Embeddings]:
        """The embedding shards."""
        return [read_shard(self._dataset, name, self._dim) for name, _ in unit.slots]

    def compute(self, unit: CellsUnit, fetched: list[Embeddings]) -> ShardData:
        """The shards' rows, sorted by part, cell and number."""
        parts = [
            CellRows(np.arange(start, start + len(rows)), self._cells.nearest(rows.vectors, 1)[:, 0], rows)
            for (_, start), rows in zip(unit.slots, fetched, strict=True)
        ]
        rows = CellRows.merge(parts)
        return ShardData(write_groups(rows, self._cells.part), len(rows), Labels.of(rows.rows.identities.tolist()))
