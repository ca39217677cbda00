"""What a search of a gallery found, merged from the answers of those who were asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Neighbours:
    """What a search found for Q queries.

    Attributes:
        scores: float32 (Q, k), exact similarities, descending; -inf where the search saw fewer than k images.
        ids: int64 (Q, k), their global numbers, ascending among equals; -1 likewise.
        nearer: int64 (Q, T), images seen that are strictly more similar than each threshold: at most what an exact search counts.
        scanned: int64 (Q,), images seen; the whole gallery where the search was exact.
    """

    scores: np.ndarray
    ids: np.ndarray
    nearer: np.ndarray
    scanned: np.ndarray

    @classmethod
    def none(cls, num_queries: int, k: int, num_thresholds: int) -> Neighbours:
        """Nothing seen yet."""
        scores, ids = np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64)
        return cls(scores, ids, np.zeros((num_queries, num_thresholds), np.int64), np.zeros(num_queries, np.int64))

    def add(self, queries: np.ndarray, scores: np.ndarray, ids: np.ndarray, nearer: np.ndarray, scanned: np.ndarray) -> None:
        """Merge one owner's answer for the queries numbered ``queries``."""
        k = self.ids.shape[1]
        scores, ids = np.concatenate([self.scores[queries], scores], 1), np.concatenate([self.ids[queries], ids], 1)
        order = np.lexsort((ids, -scores))[:, :k]
        self.scores[queries], self.ids[queries] = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        self.nearer[queries] += nearer
        self.scanned[queries] += scanned
