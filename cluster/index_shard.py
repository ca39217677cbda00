"""The actor of an index: some parts of the gallery, in memory, searched cell by cell."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cluster.cell_rows import CellRows, read_part
from cluster.coded import CodedRows
from cluster.dataset import Dataset
from cluster.embedded import GalleryError, read_shard
from cluster.index_plan import Plan
from cluster.lookahead import ahead_map
from cluster.routing import by_cell
from cluster.shard import ShardError, sha256_hex
from cluster.store import NotFound, open_store
from facemae.scan import Rows, Scan

READ_AHEAD = 2
BLOCK_PAIRS = 1 << 21


class IndexShard:
    """The actor. It loads at its first call, hence again after a restart, on whatever node that is.

    Args:
        plan: of the index.
        slots: names of embedding shards with the global number of each one's first image; or names of parts, with 0.
        threads: of torch and FAISS.
    """

    def __init__(self, plan: Plan, slots: Sequence[tuple[str, int]], threads: int) -> None:
        self._plan, self._slots, self._threads = plan, list(slots), threads
        self._rows: Rows | None = None

    def identities(self) -> np.ndarray:
        """The distinct identities here, int64 ascending. Raises GalleryError when a shard is not what it should be, StoreError when it
        cannot be read."""
        self._load()
        return np.unique(self._labels)

    def search(
        self, vectors: np.ndarray, k: int, thresholds: np.ndarray, cells: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Search some cells, or everything.

        Args:
            vectors: float16 or float32 (Q, D) unit rows.
            k: most similar images to find.
            thresholds: float32 (Q, T).
            cells: int32 (Q, P), -1 for none; None for every image here.

        Returns:
            Similarities float32 (Q, k) and global numbers int64 (Q, k), -inf and -1 where there are fewer; images nearer than each
            threshold int64 (Q, T); images seen int64 (Q,).
        """
        rows = self._load()
        if cells is not None and self._coded is not None:
            return self._coded.search(vectors, cells, k, thresholds)
        scan = Scan(rows, vectors, k, thresholds)
        for queries, first, last in self._ranges(len(vectors), cells):
            scan.compare(queries, first, last)
        return (*scan.nearest(), scan.nearer, scan.scanned)

    def same_identity(self, vectors: np.ndarray, identities: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each query, over the images of its identity here but the one numbered ``left_out``: how many int64 (Q,), and the highest
        similarity float32 (Q,), -inf where there is none."""
        held, ids = self._load().vectors, self._load().ids
        counts, best = np.zeros(len(vectors), np.int64), np.full(len(vectors), -np.inf, np.float32)
        for queries, rows in self._by_identity(identities):
            # float64 holds these sums exactly (see similarity), so a matrix product gives the same numbers as any other order
            scores = (vectors[queries].astype(np.float64) @ held[rows].astype(np.float64).T).astype(np.float32)
            own = ids[rows] == left_out[queries, None]
            scores[own] = -np.inf
            counts[queries] = len(rows) - own.sum(axis=1)
            best[queries] = scores.max(axis=1)
        return counts, best

    def _ranges(self, num_queries: int, cells: np.ndarray | None) -> Iterator[tuple[np.ndarray, int, int]]:
        """Queries and the rows they are to be compared with."""
        if cells is None:
            yield np.arange(num_queries), 0, len(self._labels)
            return
        for cell, queries in by_cell(cells):
            first, last = np.searchsorted(self._cells, (cell, cell + 1))
            if first < last:
                yield queries, int(first), int(last)

    def _load(self) -> Rows:
        """Read and verify the shards, once."""
        if self._rows is not None:
            return self._rows
        import faiss
        import torch

        torch.set_num_threads(self._threads)
        faiss.omp_set_num_threads(self._threads)
        vectors, ids, self._cells, self._labels = self._read()
        self._label_order = np.argsort(self._labels, kind="stable")
        self._sorted_labels = self._labels[self._label_order]
        self._coded = None
        if self._plan.codes is not None:
            self._coded = CodedRows(self._codes(*self._plan.codes), vectors, ids, self._cells)
        self._rows = Rows(vectors, ids, _device())
        return self._rows

    def _read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Vectors, global numbers, cells and identities of all slots, in memory; the vectors on the local disk where codes stand for
        them."""
        dataset = Dataset(self._plan.url, ".parquet")
        sizes = {manifest.shard: manifest.samples for manifest in dataset.manifests([name for name, _ in self._slots])}
        total = sum(sizes.values())
        vectors = self._room(total)
        ids, cells, labels = np.empty(total, np.int64), np.zeros(total, np.int32), np.empty(total, np.int64)
        end = 0
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            for part in ahead_map(pool, lambda slot: self._slot(dataset, *slot), self._slots, READ_AHEAD):
                here = slice(end, end + len(part))
                vectors[here], ids[here], cells[here], labels[here] = part.rows.vectors, part.ids, part.cells, part.rows.identities
                end += len(part)
        return vectors, ids, cells, labels

    def _codes(self, key: str, sha256: str) -> bytes:
        """The trained codes. Raises GalleryError when they are not what the index was built with."""
        data = open_store(self._plan.url).get(key)
        if sha256_hex(data) != sha256:
            raise GalleryError(f"{self._plan.url}/{key} was changed or damaged. Delete this index; it is built again")
        return data

    def _room(self, total: int) -> np.ndarray:
        if self._plan.codes is None or not total:
            return np.empty((total, self._plan.dim), np.float16)
        self._file = tempfile.TemporaryFile(prefix="facemae-index-")  # noqa: SIM115  # lives as long as the actor; the system removes it
        return np.memmap(self._file, np.float16, "w+", shape=(total, self._plan.dim))

    def _slot(self, dataset: Dataset, name: str, start: int) -> CellRows:
        """An embedding shard, as one cell, or a part of an index."""
        if not self._plan.cells:
            rows = read_shard(dataset, name, self._plan.dim)
            return CellRows(np.arange(start, start + len(rows)), np.zeros(len(rows), np.int32), rows)
        try:
            return read_part(dataset, name, self._plan.dim)
        except (ShardError, NotFound) as error:
            raise GalleryError(f"{dataset.url}, part {name}: {error}. Delete this index; it is built again") from None

    def _by_identity(self, identities: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Groups of queries of one identity, with the local rows of that identity; blocks of at most BLOCK_PAIRS pairs."""
        order = np.argsort(identities, kind="stable")
        for queries in np.split(order, np.flatnonzero(np.diff(identities[order])) + 1) if len(order) else ():
            first, last = (np.searchsorted(self._sorted_labels, identities[queries[0]], side) for side in ("left", "right"))
            if first < last:
                step = max(1, BLOCK_PAIRS // int(last - first))
                for s in range(0, len(queries), step):
                    yield queries[s : s + step], self._label_order[first:last]


def _device() -> Any:
    """The actor's GPU where Ray gave it one, else the CPU."""
    import ray
    import torch

    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"
