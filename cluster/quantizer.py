"""The coarse quantiser: the cells into which an index divides its images, trained by FAISS on a sample of them.

Cells are numbered so that neighbours in space are neighbours in number: an actor that holds a run of cells then owns most of what a query
probes, and few actors are asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
import torch
from safetensors.numpy import load, save

from cluster.store import StoreError
from facemae.leakage import similarity
from facemae.scan import Rows, rounding, tensor

SAMPLES_PER_CELL = 64
"""Images of the training sample for each cell; FAISS asks for 39 or more."""
ITERATIONS = 10
BLOCK = 8192


class Quantizer:
    """Cell centres in the order of their numbers, and the parts into which the cells are bundled for storage.

    Args:
        centroids: float16 (C, D) unit rows.
        part: int32 (C,), the part of each cell, ascending: a part is a run of cells.
    """

    def __init__(self, centroids: np.ndarray, part: np.ndarray) -> None:
        self.centroids, self.part = centroids, part
        self._rows = Rows(centroids)

    def __len__(self) -> int:
        return len(self.centroids)

    @classmethod
    def train(cls, sample: np.ndarray, num_cells: int, num_parts: int, seed: int = 0, gpu: bool = False) -> Quantizer:
        """Spherical k-means (FAISS) over (S, D) unit rows, S >= num_cells; parts hold about as many of the sample each."""
        options = {"niter": ITERATIONS, "spherical": True, "seed": seed, "gpu": gpu, "max_points_per_centroid": SAMPLES_PER_CELL}
        kmeans = faiss.Kmeans(sample.shape[1], num_cells, **options)
        kmeans.train(np.ascontiguousarray(sample, np.float32))
        found = np.asarray(kmeans.centroids)
        centroids = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        ordered = centroids[neighbours_first(centroids)].astype(np.float16)
        whole = cls(ordered, np.zeros(num_cells, np.int32))
        held = np.bincount(whole.nearest(sample, 1)[:, 0], minlength=num_cells)
        return cls(ordered, cut(held, num_parts))

    def nearest(self, vectors: np.ndarray, num_probes: int) -> np.ndarray:
        """The cells whose centres are most similar to each of (Q, D) unit rows, int32 (Q, min(num_probes, C)), ascending.

        Which cells these are is decided without rounding, so it depends neither on threads nor on the size of a batch.
        """
        num_probes = min(num_probes, len(self))
        return np.concatenate([self._nearest(vectors[s : s + BLOCK], num_probes) for s in range(0, max(len(vectors), 1), BLOCK)])

    def _nearest(self, vectors: np.ndarray, num_probes: int) -> np.ndarray:
        if num_probes == len(self):
            return np.tile(np.arange(len(self), dtype=np.int32), (len(vectors), 1))
        queries = tensor(vectors).float()
        scores = torch.cat([queries @ block.T for _, block in self._rows.blocks(0, len(self))], 1).numpy()
        edge, error = len(self) - num_probes, rounding(self._rows.dim)
        parted = np.partition(scores, edge, axis=1)
        last = parted[:, edge]
        close = np.flatnonzero(last - parted[:, :edge].max(axis=1) <= 2 * error)
        # rounding may have exchanged cells at the edge: their similarities are computed again without it
        rows, cells = np.nonzero(np.abs(scores[close] - last[close, None]) <= 2 * error)
        rows = close[rows]
        scores[rows, cells] = similarity(vectors[rows], self.centroids[cells])
        last[close] = np.partition(scores[close], edge, axis=1)[:, edge]
        kept = scores >= last[:, None]
        for row in np.flatnonzero(kept.sum(axis=1) > num_probes):  # equally similar: the lower numbers
            kept[row] = False
            kept[row, np.argsort(-scores[row], kind="stable")[:num_probes]] = True
        return np.nonzero(kept)[1].reshape(len(vectors), num_probes).astype(np.int32)

    def to_bytes(self) -> bytes:
        """As safetensors."""
        return save({"centroids": self.centroids, "part": self.part})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Quantizer:
        """The inverse. Raises StoreError naming ``where`` for anything else."""
        try:
            tensors = load(data)
            centroids, part = tensors["centroids"], tensors["part"]
        except Exception as error:  # safetensors has errors of several kinds, all of them about the bytes
            raise StoreError(f"{where} is no quantiser ({error}): delete this index, it is built again", fatal=True) from None
        sound = centroids.ndim == 2 and centroids.dtype == np.float16 and np.isfinite(centroids).all() and part.shape == centroids.shape[:1]
        if not sound or (np.diff(part) < 0).any():
            raise StoreError(
                f"{where} is no quantiser ({centroids.dtype} {centroids.shape}): delete this index, it is built again", fatal=True
            )
        return cls(centroids, part)


def cut(weights: np.ndarray, num_parts: int) -> np.ndarray:
    """Cut a row of (C,) weights into runs of about the same weight. Returns the run of each, int32 (C,), ascending from 0."""
    middle = np.cumsum(weights) - weights / 2
    runs = np.minimum(middle * num_parts // max(weights.sum(), 1), num_parts - 1)
    return np.unique(runs, return_inverse=True)[1].astype(np.int32)


def neighbours_first(centroids: np.ndarray) -> np.ndarray:
    """An order of (C, D) points in which neighbours in space are mostly neighbours in number: halved again and again at the median of
    their first principal component. Returns int64 (C,)."""
    if len(centroids) <= 2:
        return np.arange(len(centroids))
    centred = centroids.astype(np.float64) - centroids.mean(axis=0)
    values, vectors = np.linalg.eigh(centred @ centred.T if len(centroids) < centroids.shape[1] else centred.T @ centred)
    axis = vectors[:, int(np.argmax(values))]
    position = axis if len(centroids) < centroids.shape[1] else centred @ axis
    order = np.argsort(position, kind="stable")
    halves: Sequence[np.ndarray] = np.array_split(order, 2)
    return np.concatenate([half[neighbours_first(centroids[half])] for half in halves])
