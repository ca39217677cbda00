"""The coarse quantiser: the cells into which an index divides its images, trained by FAISS on a sample of them.

Cells are numbered so that neighbours in space are neighbours in number: an actor that holds a run of cells then owns most of what a query
probes, and few actors are asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
from safetensors.numpy import load, save

from cluster.store import StoreError
from facemae.leakage import similarity
from facemae.scan import rounding

SAMPLES_PER_CELL = 64
"""Images of the training sample for each cell; FAISS asks for 39 or more."""
ITERATIONS = 10
SPARE_CELLS = 8
"""Cells looked up beyond those asked for, to decide ties at the edge."""


class Quantizer:
    """Cell centres in the order of their numbers, and the parts into which the cells are bundled for storage.

    Args:
        centroids: float16 (C, D) unit rows.
        part: int32 (C,), the part of each cell, ascending: a part is a run of cells.
    """

    def __init__(self, centroids: np.ndarray, part: np.ndarray) -> None:
        self.centroids, self.part = centroids, part
        self._exact = centroids.astype(np.float32)

    def __len__(self) -> int:
        return len(self.centroids)

    def __reduce__(self) -> tuple[type[Quantizer], tuple[np.ndarray, np.ndarray]]:
        """Pickled without the copy in single precision, which is two thirds of it."""
        return Quantizer, (self.centroids, self.part)

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
        if num_probes == len(self):
            return np.tile(np.arange(len(self), dtype=np.int32), (len(vectors), 1))
        width = min(num_probes + SPARE_CELLS, len(self))
        scores, cells = faiss.knn(vectors.astype(np.float32), self._exact, width, metric=faiss.METRIC_INNER_PRODUCT)
        edge, slack = scores[:, num_probes - 1], 2 * rounding(self._exact.shape[1])
        unsure = np.flatnonzero(edge - scores[:, num_probes] <= slack)  # rounding may have exchanged cells at the edge
        cells[unsure] = self._sorted(vectors[unsure], scores[unsure], cells[unsure], edge[unsure, None], slack)
        return np.sort(cells[:, :num_probes].astype(np.int32), axis=1)

    def _sorted(self, vectors: np.ndarray, scores: np.ndarray, cells: np.ndarray, edge: np.ndarray, slack: float) -> np.ndarray:
        """Candidates (Q, W) by similarity, what lies near ``edge`` without rounding; of equally similar ones the lower numbers first."""
        rows, columns = np.nonzero(np.abs(scores - edge) <= slack)
        scores[rows, columns] = similarity(vectors[rows], self.centroids[cells[rows, columns]])
        found = np.take_along_axis(cells, np.lexsort((cells, -scores)), 1)
        if cells.shape[1] < len(self):
            for row in np.flatnonzero(scores[:, -1] >= edge[:, 0] - 2 * slack):  # more of them than there are candidates
                found[row] = np.argsort(-similarity(vectors[row], self.centroids), kind="stable")[: cells.shape[1]]
        return found

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
    centered = centroids.astype(np.float64) - centroids.mean(axis=0)
    values, vectors = np.linalg.eigh(centered @ centered.T if len(centroids) < centroids.shape[1] else centered.T @ centered)
    axis = vectors[:, int(np.argmax(values))]
    position = axis if len(centroids) < centroids.shape[1] else centered @ axis
    order = np.argsort(position, kind="stable")
    halves: Sequence[np.ndarray] = np.array_split(order, 2)
    return np.concatenate([half[neighbours_first(centroids[half])] for half in halves])
