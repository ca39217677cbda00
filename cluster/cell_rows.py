"""Images of an index with their cells: the table, in the intermediate set with one row group a part, and as a part of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset import Dataset, Manifest
from cluster.embedding import Embeddings
from cluster.shard import ShardError
from cluster.store import Store


@dataclass(frozen=True)
class CellRows:
    """Images of some cells, sorted by cell and then by number.

    Attributes:
        ids: int64 (N,), global numbers.
        cells: int32 (N,).
        rows: key, identity and vector of each.
    """

    ids: np.ndarray
    cells: np.ndarray
    rows: Embeddings

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def merge(cls, parts: Sequence[CellRows]) -> CellRows:
        """The rows of all parts, sorted."""
        ids, cells = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "cells"))
        identities = np.concatenate([part.rows.identities for part in parts])
        vectors = np.concatenate([part.rows.vectors for part in parts])
        keys = [key for part in parts for key in part.rows.keys]
        return cls(ids, cells, Embeddings(keys, identities, vectors)).sorted()

    def sorted(self) -> CellRows:
        """The same rows in order."""
        order = np.lexsort((self.ids, self.cells))
        keys = [self.rows.keys[i] for i in order]
        return CellRows(self.ids[order], self.cells[order], Embeddings(keys, self.rows.identities[order], self.rows.vectors[order]))

    def to_table(self) -> pa.Table:
        """The rows as a table."""
        flat = pa.array(np.ascontiguousarray(self.rows.vectors).reshape(-1))
        return pa.table(
            {
                "key": pa.array(list(self.rows.keys), pa.string()),
                "identity": pa.array(self.rows.identities, pa.int64()),
                "id": pa.array(self.ids, pa.int64()),
                "cell": pa.array(self.cells, pa.int32()),
                "embedding": pa.FixedSizeListArray.from_arrays(flat, self.rows.vectors.shape[1]),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> CellRows:
        """The inverse. Raises ShardError for another table."""
        try:
            table = table.combine_chunks()
            column = table["embedding"].combine_chunks()
            vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
            rows = Embeddings(table["key"].to_pylist(), table["identity"].to_numpy(), vectors)
            return cls(table["id"].to_numpy(), table["cell"].to_numpy(), rows)
        except (pa.ArrowException, ValueError, KeyError, AttributeError) as error:
            raise ShardError(f"no table of an index: {error}") from None


def write_groups(rows: CellRows, part: np.ndarray) -> bytes:
    """Sorted rows as parquet, one row group for each part that has any; ``part``: int32 (C,), of each cell."""
    parts = part[rows.cells]
    present, first = np.unique(parts, return_index=True)
    table = rows.to_table().replace_schema_metadata({"parts": json.dumps(present.tolist())})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="none", use_dictionary=False, write_page_checksum=True) as writer:
        for start, stop in zip(first, [*first[1:], len(rows)], strict=True):
            writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
    return sink.getvalue().to_pybytes()


class GroupReader:
    """Reads the rows of one part out of many shards, a range of each; it keeps their footers."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._footers: dict[str, tuple[pq.FileMetaData, dict[int, int]]] = {}

    def read(self, manifest: Manifest, part: int) -> CellRows | None:
        """The rows of a part, or None where the shard has none. Raises ShardError for damage, NotFound."""
        if manifest.file is None:
            return None
        where = f"{self._dataset.url}/{manifest.file}"
        source = pa.PythonFile(RangeFile(self._dataset.store, manifest.file, manifest.num_bytes), "r")
        try:
            if manifest.file not in self._footers:
                footer = pq.read_metadata(source)
                groups = {number: i for i, number in enumerate(json.loads(footer.metadata[b"parts"]))}
                self._footers[manifest.file] = footer, groups
            footer, groups = self._footers[manifest.file]
            if part not in groups:
                return None
            file = pq.ParquetFile(source, metadata=footer, pre_buffer=True, page_checksum_verification=True)
            return CellRows.from_table(file.read_row_group(groups[part]))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{where}: {error}: delete it and its manifest and run the same command again") from None


class RangeFile(io.RawIOBase):
    """An object of a store as a file that is read by ranges."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        super().__init__()
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; nothing is read."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """The next bytes, by one request."""
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        data = self._store.get_range(self._key, self._at, stop) if stop > self._at else b""
        self._at += len(data)
        return data


def read_part(dataset: Dataset, name: str, dim: int) -> CellRows:
    """One part of an index, checked against its manifest. Raises ShardError, NotFound."""
    manifest = dataset.manifest(name)
    if manifest.file is None:
        return CellRows(np.empty(0, np.int64), np.empty(0, np.int32), Embeddings([], np.empty(0, np.int64), np.empty((0, dim), np.float16)))
    rows = CellRows.from_table(pq.read_table(pa.BufferReader(dataset.read(manifest))))
    if len(rows) != manifest.samples or rows.rows.vectors.shape[1:] != (dim,):
        raise ShardError(f"{rows.rows.vectors.shape} embeddings, expected {(manifest.samples, dim)}")
    return rows
