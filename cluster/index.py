"""A gallery of embeddings held by Ray actors: FAISS shards, searched together, the same answer however they are divided.

Each actor reads its part of the gallery from the store by name; vectors and keys never pass through the driver. Every image has a global
number, its shard's first number + its row, so that an answer is two small arrays.

The answer is exact and reproducible: FAISS proposes candidates in float32, their similarities are computed again without rounding
(facemae.leakage.similarity), and where float32 could have missed one the search is repeated wider. It therefore does not depend on the
number of actors, threads or queries at once, nor on CPU or GPU. Equal similarities come in the order of global numbers. (Where more than
MAX_CANDIDATES items lie within float32's error of the k-th similarity, which are all but copies of each other, some of these are named
instead of others; their similarities differ by less than 1e-4.)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.dataset import Dataset
from cluster.embedding import Embeddings, read_embeddings
from cluster.lookahead import ahead_map
from cluster.shard import ShardError
from cluster.store import StoreError
from facemae.leakage import similarity

SPARE_CANDIDATES = 5
"""Candidates beyond k asked of FAISS in the first round."""
MAX_CANDIDATES = 2048
"""The widest round; FAISS on a GPU gives no more."""
MAX_RESTARTS = 3
"""Times that one actor is rebuilt from the store after its process or node was lost."""
BYTES_PER_ACTOR = 4 << 30
READ_AHEAD = 4
BLOCK_ROWS = 1024
BLOCK_PAIRS = 1 << 21


class GalleryError(StoreError):
    """The gallery cannot be searched; the message names the shard, the reason and the remedy. Always fatal: it ends a stage."""

    def __init__(self, message: str, *, fatal: bool = True) -> None:
        super().__init__(message, fatal=fatal)


@dataclass(frozen=True)
class GalleryOptions:
    """How a gallery is spread; nothing here changes a search's result.

    Attributes:
        num_actors: 0 takes one a node, and as many as it needs for none to hold more than 4 GiB.
        cpus_per_actor: CPU cores that Ray sets aside for each. 0 by default: an actor waits whenever the stage's workers compute and works
            whenever they wait, and cores set aside for a gallery on a small cluster would leave none to the workers, which then never
            start. On a large cluster, set it to the threads of an actor.
        gpus_per_actor: GPUs of each, fractions allowed.
        threads: FAISS threads of each; 0 divides the cluster's cores.
    """

    num_actors: int = 0
    cpus_per_actor: float = 0.0
    gpus_per_actor: float = 0.0
    threads: int = 0


def require_unit_rows(vectors: np.ndarray, dim: int, where: str) -> None:
    """Raise GalleryError, naming ``where`` and the row, unless ``vectors`` is (N, dim) with finite rows of unit length."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise GalleryError(f"{where}: embeddings of shape {vectors.shape} in a gallery of {dim} dimensions: of another recogniser?")
    lengths = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float32)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < 0.02))  # a NaN is bad too
    if len(bad):
        raise GalleryError(
            f"{where}: {len(bad)} embeddings are not of unit length (row {bad[0]}: squared length {lengths[bad[0]]:.3g}): zero, not finite "
            "or not normalised. Delete this set of embeddings and run `facemae embed` again"
        )


class GalleryShard:
    """The actor: one part of a gallery, in memory. It loads at its first call, hence again after a restart."""

    def __init__(self, url: str, slots: Sequence[tuple[str, int]], dim: int, threads: int) -> None:
        """``slots``: each shard's name and the global number of its first row, ascending."""
        self._url, self._dim, self._threads = url, dim, threads
        self._slots = list(slots)
        self._index: Any = None

    def size(self) -> int:
        """Number of images. Raises GalleryError when a shard is not what it should be, StoreError when it cannot be read."""
        self._load()
        return len(self._ids)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar images to each of (Q, dim) unit rows: scores float32 and global numbers int64, (Q, min(k, size))."""
        self._load()
        scores, rows = self._nearest(vectors, min(k, len(self._ids)), k + SPARE_CANDIDATES)
        return scores, self._ids[rows]

    def same_identity(self, vectors: np.ndarray, identities: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each query, over the images of its identity here but the one numbered ``left_out``: how many int64 (Q,), and the highest
        similarity float32 (Q,), -inf where there is none."""
        self._load()
        counts, best = np.zeros(len(vectors), np.int64), np.full(len(vectors), -np.inf, np.float32)
        for queries, rows in self._by_identity(identities):
            gallery = self._vectors[rows].astype(np.float64)
            # float64 holds these sums exactly (see similarity), so a matrix product gives the same numbers as any other order
            scores = (vectors[queries].astype(np.float64) @ gallery.T).astype(np.float32)
            own = self._ids[rows] == left_out[queries, None]
            scores[own] = -np.inf
            counts[queries] = len(rows) - own.sum(axis=1)
            best[queries] = scores.max(axis=1)
        return counts, best

    def lookup(self, ids: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Keys and identities of images of this part by global number."""
        self._load()
        rows = np.searchsorted(self._ids, ids)
        return self._keys.take(pa.array(rows)).to_pylist(), self._labels[rows]

    def _load(self) -> None:
        """Read, verify and index the shards, once."""
        if self._index is not None:
            return
        faiss.omp_set_num_threads(self._threads)
        index, dataset = faiss.IndexFlatIP(self._dim), Dataset(self._url, ".parquet")
        ids, labels, keys = list[np.ndarray](), list[np.ndarray](), list[pa.Array]()
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            parts = ahead_map(pool, lambda slot: _read(dataset, slot[0], self._dim), self._slots, READ_AHEAD)
            for (_, start), rows in zip(self._slots, parts, strict=True):
                index.add(rows.vectors.astype(np.float32))
                ids.append(np.arange(start, start + len(rows)))
                labels.append(rows.identities)
                keys.append(pa.array(rows.keys, pa.string()))
        self._vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * self._dim).reshape(-1, self._dim)  # no second copy
        self._ids, self._labels, self._keys = np.concatenate(ids), np.concatenate(labels), pa.chunked_array(keys)
        self._label_order = np.argsort(self._labels, kind="stable")
        self._sorted_labels = self._labels[self._label_order]
        self._on_cpu, self._index = index, _to_gpu(index)

    def _nearest(self, vectors: np.ndarray, k: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact top k as scores and local rows, by candidates that FAISS finds."""
        width = max(k, min(width, len(self._ids), MAX_CANDIDATES))
        rough, rows = self._index.search(vectors.astype(np.float32), width)
        scores = np.concatenate([self._rescore(vectors[s : s + BLOCK_ROWS], rows[s : s + BLOCK_ROWS]) for s in _starts(vectors)])
        order = np.lexsort((rows, -scores))[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        # what FAISS left out is at most this similar (the bound on the rounding of a float32 inner product, doubled)
        missed = rough[:, -1] + self._dim * 2.0**-23
        unsure = np.flatnonzero(missed >= scores[:, -1])
        if len(unsure) and width < min(len(self._ids), MAX_CANDIDATES):
            scores[unsure], rows[unsure] = self._nearest(vectors[unsure], k, 8 * width)
        return scores, rows

    def _rescore(self, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return similarity(vectors[:, None, :], self._vectors[rows])

    def _by_identity(self, identities: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Groups of queries of one identity, with the local rows of that identity; blocks of at most BLOCK_PAIRS pairs."""
        order = np.argsort(identities, kind="stable")
        for queries in np.split(order, np.flatnonzero(np.diff(identities[order])) + 1) if len(order) else ():
            first, last = (np.searchsorted(self._sorted_labels, identities[queries[0]], side) for side in ("left", "right"))
            if first < last:
                step = max(1, BLOCK_PAIRS // int(last - first))
                for s in range(0, len(queries), step):
                    yield queries[s : s + step], self._label_order[first:last]


def _starts(vectors: np.ndarray) -> range:
    return range(0, max(len(vectors), 1), BLOCK_ROWS)


def _read(dataset: Dataset, shard: str, dim: int) -> Embeddings:
    """One embedding shard, verified against its manifest."""
    manifest = dataset.manifest(shard)
    where = f"{dataset.url}/{manifest.file}"
    try:
        rows = read_embeddings(dataset.read(manifest))
    except ShardError as error:
        raise GalleryError(f"{where}: {error}") from None
    if len(rows) != manifest.samples:
        raise GalleryError(f"{where}: {len(rows)} rows, its manifest says {manifest.samples}: run `facemae verify` on the set")
    require_unit_rows(rows.vectors, dim, where)
    return rows


def _to_gpu(index: Any) -> Any:
    """A clone on the actor's GPU where it has one, else the index itself."""
    if ray.is_initialized() and ray.get_gpu_ids() and faiss.get_num_gpus() > 0:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    return index


class Gallery:
    """The gallery as the driver and the stage's workers hold it: the numbering and, once loaded, the actors. Picklable; it holds no
    embedding. Use it as a context manager, or ``close`` it.

    Args:
        embeddings: a data set of embedding shards.
        dim: their length.
        options: how it is spread.

    Raises:
        GalleryError: the data set holds no embeddings, or the actors would take every core of the cluster.
    """

    def __init__(self, embeddings: Dataset, dim: int, options: GalleryOptions | None = None) -> None:
        manifests = [manifest for manifest in embeddings.manifests() if manifest.samples]
        if not manifests:
            raise GalleryError(f"{embeddings.url} holds no embeddings: run `facemae embed` on the set")
        self.url, self.dim, self._options = embeddings.url, dim, options or GalleryOptions()
        self.names = [manifest.shard for manifest in manifests]
        self._starts = np.cumsum([0, *(manifest.samples for manifest in manifests)])
        num_actors = self._options.num_actors or _default_actors(len(self) * dim * 4)
        self._homes = _deal([manifest.samples for manifest in manifests], min(num_actors, len(manifests)))
        self._actors: list[Any] = []
        _require_room(int(self._homes.max()) + 1, self._options)

    def load(self) -> None:
        """Start the actors, where they are not there yet, and wait until each holds its part. Ray must be connected.

        Raises:
            GalleryError: a shard is not what it should be.
            StoreError: one cannot be read.
        """
        num_actors = int(self._homes.max()) + 1
        remote = ray.remote(GalleryShard).options(
            num_cpus=self._options.cpus_per_actor,
            num_gpus=self._options.gpus_per_actor,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
            scheduling_strategy="SPREAD",
        )
        threads = self._options.threads or max(1, int(ray.cluster_resources().get("CPU", 1) // num_actors))
        for actor in range(len(self._actors), num_actors):
            slots = [(self.names[i], int(self._starts[i])) for i in np.flatnonzero(self._homes == actor)]
            self._actors.append(remote.remote(self.url, slots, self.dim, threads))
        self._ask("size")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def start(self, shard: str) -> int:
        """The global number of a shard's first row. Raises GalleryError when the gallery has no such shard."""
        place = bisect_left(self.names, shard)
        if place == len(self.names) or self.names[place] != shard:
            raise GalleryError(f"{self.url} has no embeddings of shard {shard}: run `facemae embed` on the set")
        return int(self._starts[place])

    def search(self, vectors: np.ndarray | ray.ObjectRef, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar gallery images to each query, exactly; ties in the order of global numbers.

        Args:
            vectors: float16 or float32 (Q, dim) unit rows, or a Ray reference to them.

        Returns:
            Scores float32 (Q, k), descending, and global numbers int64 (Q, k); -inf and -1 where the gallery is smaller than k.

        Raises:
            GalleryError: a shard is not what it should be, or actors keep dying.
        """
        parts = self._ask("search", vectors, k)
        scores, ids = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        order = np.lexsort((ids, -scores))[:, :k]
        padding = ((0, 0), (0, k - order.shape[1]))
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        return np.pad(scores, padding, constant_values=-np.inf), np.pad(ids, padding, constant_values=-1)

    def same_identity(
        self, vectors: np.ndarray | ray.ObjectRef, identities: np.ndarray, left_out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The gallery images of each query's identity but the one numbered ``left_out``.

        Args:
            vectors: as in ``search``.
            identities: int64 (Q,).
            left_out: int64 (Q,), global numbers, -1 for none.

        Returns:
            How many there are, int64 (Q,), and the highest similarity, float32 (Q,), NaN where there is none.
        """
        counts, best = zip(*self._ask("same_identity", vectors, identities, left_out), strict=True)
        total = np.sum(counts, axis=0)
        return total, np.where(total > 0, np.max(best, axis=0), np.float32(np.nan))

    def lookup(self, ids: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Keys and identities, int64 (N,), of images by global number (N,)."""
        ids = np.asarray(ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise GalleryError(f"global numbers run from 0 to {len(self) - 1}, asked for {ids.min()} to {ids.max()}")
        homes = self._homes[np.searchsorted(self._starts, ids, side="right") - 1]
        keys, labels = np.empty(len(ids), object), np.empty(len(ids), np.int64)
        for home in np.unique(homes):
            mine = np.flatnonzero(homes == home)
            keys[mine], labels[mine] = _answers([self._actors[home].lookup.remote(ids[mine])])[0]
        return keys.tolist(), labels

    def close(self) -> None:
        """End the actors."""
        while self._actors:
            ray.kill(self._actors.pop())

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, method: str, vectors: np.ndarray | ray.ObjectRef | None = None, *rest: Any) -> list[Any]:
        """The answer of every actor; the queries are put into Ray's object store once."""
        if not self._actors:
            self.load()
        shared = () if vectors is None else (vectors if isinstance(vectors, ray.ObjectRef) else ray.put(vectors),)
        return _answers([getattr(actor, method).remote(*shared, *rest) for actor in self._actors])


def _answers(calls: Sequence[ray.ObjectRef]) -> list[Any]:
    try:
        return ray.get(list(calls))
    except RayActorError as error:
        raise GalleryError(f"a gallery actor died more than {MAX_RESTARTS} times ({error}): give it memory, or use more actors") from None
    except RayTaskError as error:
        if isinstance(error.cause, StoreError):
            raise error.cause from None
        raise


def _deal(sizes: Sequence[int], num_actors: int) -> np.ndarray:
    """The actor of each shard, int64: the largest shards first, dealt round and back so that all hold about as much."""
    turn = np.concatenate([np.arange(num_actors), np.arange(num_actors)[::-1]])
    homes = np.empty(len(sizes), np.int64)
    homes[np.argsort(-np.asarray(sizes), kind="stable")] = np.resize(turn, len(sizes))
    return homes


def _default_actors(num_bytes: int) -> int:
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return max(1, nodes, -(-num_bytes // BYTES_PER_ACTOR))


def _require_room(num_actors: int, options: GalleryOptions) -> None:
    """Raise GalleryError when the actors, with one worker beside them, do not fit: the search would wait for ever."""
    total = ray.cluster_resources()
    wanted = {"CPU": (num_actors * options.cpus_per_actor, 1), "GPU": (num_actors * options.gpus_per_actor, 0)}
    for kind, (share, beside) in wanted.items():
        if share and share + beside > total.get(kind, 0):
            raise GalleryError(
                f"{num_actors} gallery actors ask for {share:g} {kind} of the cluster's {total.get(kind, 0):g}"
                f"{', and the workers need one' if beside else ''}: use fewer actors, or less {kind} for each"
            )
