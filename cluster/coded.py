"""Rows held as FAISS codes (PQ, SQ8, ...), for galleries whose embeddings do not fit the actors' memory.

FAISS proposes candidates by their codes; these are compared exactly, with the embeddings on the local disk. What FAISS does not propose is
not counted, so an image found this way is at least as near as the count says: a rank can only be too low, the leakage only too high.
"""

from __future__ import annotations

from typing import Any, cast

import faiss
import numpy as np

from cluster.quantizer import Quantizer
from facemae.leakage import similarity

CANDIDATES = 100
"""Rows that FAISS proposes for each query, at least; of these the exact similarities are computed."""
BLOCK = 65536


def empty_index(factory: str, dim: int) -> Any:
    """FAISS's index of the kind ``factory`` names ("IVF1024,PQ64"), of vectors of this length, untrained.

    Raises:
        ValueError: FAISS knows no such index, or it is no IVF index.
    """
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        why = str(error).rpartition(": ")[2]
        raise ValueError(
            f"FAISS makes no index of {factory!r} for embeddings of {dim} numbers ({why}): e.g. IVF1024,PQ{dim // 8}"
        ) from None
    if not isinstance(index, faiss.IndexIVF):
        raise ValueError(f"{factory!r} is no plain IVF index (it is a {type(index).__name__}): e.g. IVF1024,PQ{dim // 8}")
    return index


def train_codes(factory: str, quantizer: Quantizer, sample: np.ndarray) -> bytes:
    """An empty FAISS index over the cells of ``quantizer``, its codes trained on (S, D) unit rows. Raises ValueError as empty_index."""
    index = empty_index(factory, sample.shape[1])
    if isinstance(index, faiss.IndexIVFPQ):
        cast(Any, index).do_polysemous_training = False  # for a kind of search that is not done here, and most of the time of a training
        cast(Any, index).pq.cp.min_points_per_centroid = 1  # a small set is no reason for a page of warnings
    index.quantizer.reset()
    index.quantizer.add(quantizer.centroids.astype(np.float32))
    index.train(np.ascontiguousarray(sample, np.float32))
    return faiss.serialize_index(index).tobytes()


class CodedRows:
    """Some cells' rows in a FAISS index.

    Args:
        trained: what ``train_codes`` gave.
        vectors: float16 (N, D) unit rows, a memory map or an array.
        ids: int64 (N,), their global numbers.
        cells: int32 (N,), their cells.
    """

    def __init__(self, trained: bytes, vectors: np.ndarray, ids: np.ndarray, cells: np.ndarray) -> None:
        self._index = cast(Any, faiss.deserialize_index(np.frombuffer(trained, np.uint8)))
        self._vectors, self._ids = vectors, ids
        self._centroids = self._index.quantizer.reconstruct_n(0, self._index.nlist)
        self._sizes = np.bincount(cells, minlength=self._index.nlist)
        for start in range(0, len(vectors), BLOCK):
            block = np.ascontiguousarray(vectors[start : start + BLOCK], np.float32)
            rows, lists = np.arange(start, start + len(block)), cells[start : start + BLOCK].astype(np.int64)
            self._index.add_core(len(block), faiss.swig_ptr(block), faiss.swig_ptr(rows), faiss.swig_ptr(lists))

    def search(
        self, vectors: np.ndarray, probes: np.ndarray, k: int, thresholds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Search the cells ``probes``, int32 (Q, P), -1 for none.

        Returns:
            As facemae.scan.Scan: similarities (Q, k), ids (Q, k), rows nearer than each threshold (Q, T), rows in the cells searched (Q,).
        """
        if not len(self._ids):  # an actor of empty parts
            none, nobody = np.full((len(vectors), k), -np.inf, np.float32), np.full((len(vectors), k), -1, np.int64)
            return none, nobody, np.zeros(thresholds.shape, np.int64), np.zeros(len(vectors), np.int64)
        rows = self._candidates(vectors, probes, max(k, CANDIDATES))
        scores = np.full(rows.shape, -np.inf, np.float32)
        for s in range(0, len(rows), 256):
            part = slice(s, s + 256)
            exact = similarity(vectors[part, None, :], self._vectors[np.maximum(rows[part], 0)])
            scores[part] = np.where(rows[part] < 0, np.float32(-np.inf), exact)
        ids = np.where(rows < 0, -1, self._ids[rows])
        order = np.lexsort((ids, -scores))[:, :k]
        nearer = (scores[:, :, None] > thresholds[:, None, :]).sum(axis=1)
        scanned = np.where(probes < 0, 0, self._sizes[probes]).sum(axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1), nearer, scanned

    def _candidates(self, vectors: np.ndarray, probes: np.ndarray, width: int) -> np.ndarray:
        queries = np.ascontiguousarray(vectors, np.float32)
        lists = np.ascontiguousarray(probes, np.int64)
        coarse = np.einsum("qd,qpd->qp", queries, self._centroids[np.maximum(lists, 0)]).astype(np.float32)
        self._index.nprobe = lists.shape[1]
        return self._index.search_preassigned(queries, width, lists, coarse)[1]
