"""Blockwise comparison of queries with rows: the most similar rows, and how many rows are more similar than a threshold.

The product of two blocks in float32 finds the candidates; whatever lies within its rounding error of a decision is computed again without
rounding (facemae.leakage.similarity). For float16 rows the answer is therefore exact: it does not depend on the size of the blocks, the
number of threads, CPU or GPU. This is where a leakage search spends its time, and counting costs a tenth of the product beside it; FAISS
has no count by a threshold of each query's own (benchmarks/index.py compares the two).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from facemae.leakage import similarity

BLOCK_ROWS = 4096
BLOCK_PAIRS = 1 << 21
"""Similarities computed at once: 8 MB, which a core's cache nearly holds."""
SPARE_CANDIDATES = 5
"""Candidates beyond k that are kept in the first round."""
MAX_CANDIDATES = 2048
RESCORE_PAIRS = 2048


def rounding(dim: int) -> float:
    """A bound on the error of a float32 inner product of two rows of this length that are of unit length up to half precision, in any order
    of summation (Higham, Accuracy and Stability of Numerical Algorithms, eq. 3.4, with 2 % to spare)."""
    return 1.02 * dim * 2.0**-24


class Rows:
    """Rows that are searched: on the CPU where they lie (a memory map too), or copied to a GPU.

    Args:
        vectors: float16 or float32 (N, D) unit rows.
        ids: int64 (N,), the number of each, by which equally similar rows are ordered; default 0 .. N-1.
        device: "cpu" or a CUDA device.
    """

    def __init__(self, vectors: np.ndarray, ids: np.ndarray | None = None, device: str = "cpu") -> None:
        self.vectors, self.device = vectors, torch.device(device)
        self.ids = np.arange(len(vectors)) if ids is None else ids
        self._resident = None if device == "cpu" else torch.from_numpy(np.ascontiguousarray(vectors)).to(device)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Length of a row."""
        return int(self.vectors.shape[1])

    def blocks(self, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Number of the first row and float32 (n, D) of each block of rows ``first`` to ``last`` (exclusive)."""
        for start in range(first, last, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, last)
            if self._resident is not None:
                yield start, self._resident[start:stop].float()
            else:
                yield start, tensor(self.vectors[start:stop]).float()


class Scan:
    """One batch of queries against any number of ranges of ``rows``, one after another.

    Args:
        rows: what is searched.
        vectors: float16 or float32 (Q, D) unit rows.
        k: most similar rows to find for each query.
        thresholds: float32 (Q, T); NaN counts nothing.
        width: rows kept as candidates for each query in the first round; the results do not depend on it.

    Attributes:
        nearer: int64 (Q, T), rows seen that are strictly more similar than each threshold.
        scanned: int64 (Q,), rows seen.
    """

    def __init__(self, rows: Rows, vectors: np.ndarray, k: int, thresholds: np.ndarray | None = None, width: int | None = None) -> None:
        self._rows, self._vectors, self._k = rows, vectors, k
        self._queries = tensor(vectors).to(rows.device).float()
        thresholds = np.empty((len(vectors), 0), np.float32) if thresholds is None else thresholds
        self._thresholds, self._error = thresholds, rounding(rows.dim)
        self._limits = torch.from_numpy(np.ascontiguousarray(thresholds, np.float32)).to(rows.device)
        self.nearer = np.zeros(thresholds.shape, np.int64)
        self.scanned = np.zeros(len(vectors), np.int64)
        self._width = min(width or k + SPARE_CANDIDATES, MAX_CANDIDATES) if k else 0
        self._rough = torch.full((len(vectors), self._width), -torch.inf, device=rows.device)
        self._found = torch.full((len(vectors), self._width), -1, dtype=torch.int64, device=rows.device)
        self._gathered = self._scores = torch.empty(0, device=rows.device)
        self._seen = list[tuple[np.ndarray, int, int]]()

    def compare(self, queries: np.ndarray, first: int, last: int) -> None:
        """The queries numbered ``queries`` against rows ``first`` to ``last`` (exclusive), each of which a query may meet only once."""
        self._seen.append((queries, first, last))
        self.scanned[queries] += last - first
        for start, block in self._rows.blocks(first, last):
            step = max(1, BLOCK_PAIRS // len(block))
            for s in range(0, len(queries), step):
                chosen = queries[s : s + step]
                places = torch.from_numpy(chosen).to(self._rows.device)
                scores = self._product(places, block)
                self._count(chosen, places, scores, start)
                if self._width:
                    self._keep(places, scores, start)

    def _product(self, places: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Similarities of some queries and a block of rows, float32 (q, n), in memory that is used again: fresh pages cost as much as the
        product of a small block."""
        size = len(places), len(block)
        if self._gathered.numel() < size[0] * block.shape[1]:
            self._gathered = torch.empty(size[0] * block.shape[1], device=self._rows.device)
        if self._scores.numel() < size[0] * size[1]:
            self._scores = torch.empty(size[0] * size[1], device=self._rows.device)
        queries = self._gathered[: size[0] * block.shape[1]].view(size[0], block.shape[1])
        torch.index_select(self._queries, 0, places, out=queries)
        return torch.mm(queries, block.T, out=self._scores[: size[0] * size[1]].view(size))

    def _count(self, queries: np.ndarray, places: torch.Tensor, scores: torch.Tensor, start: int) -> None:
        """Count what is surely nearer; look again at what is too close to tell."""
        for column in range(self._limits.shape[1]):
            limit = self._limits[places, column, None]
            surely, perhaps = scores > limit + self._error, scores >= limit - self._error
            self.nearer[queries, column] += _count_rows(surely)
            close, seen = _places(surely ^ perhaps)
            if len(close):
                chosen = queries[close]
                near = similarity(self._vectors[chosen], self._rows.vectors[start + seen]) > self._thresholds[chosen, column]
                np.add.at(self.nearer[:, column], chosen[near], 1)

    def _keep(self, places: torch.Tensor, scores: torch.Tensor, start: int) -> None:
        """Merge the block's most similar rows into the candidates, for the queries where it has any that belong there."""
        better = torch.nonzero(scores.amax(1) > self._rough[places, -1]).flatten()
        if not len(better):
            return
        values, columns = scores[better].topk(min(self._width, scores.shape[1]), 1)
        target = places[better]
        values, order = torch.cat([self._rough[target], values], 1).topk(self._width, 1)
        self._found[target] = torch.cat([self._found[target], columns + start], 1).gather(1, order)
        self._rough[target] = values

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar of the rows seen: similarities float32 (Q, k), descending, and ids int64 (Q, k), ascending among equals; -inf
        and -1 where fewer were seen.

        (Where more than MAX_CANDIDATES rows lie within rounding of the k-th similarity, all but copies of each other, some of these are
        named instead of others.)
        """
        rough, found = self._rough.cpu().numpy(), self._found.cpu().numpy()
        scores, ids = self._rescore(rough, found), np.where(found < 0, -1, self._rows.ids[found])
        order = np.lexsort((ids, -scores))[:, : self._k]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
        if self._k and self._width < MAX_CANDIDATES:
            # what was not kept is at most as similar as the last candidate, up to rounding
            unsure = np.flatnonzero((rough[:, -1] + self._error >= scores[:, -1]) & (self.scanned > self._width))
            if len(unsure):
                scores[unsure], ids[unsure] = self._again(unsure)
        return scores, ids

    def _rescore(self, rough: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Exact similarities of the candidates that may be among the k most similar, -inf for the others."""
        scores = np.full(found.shape, -np.inf, np.float32)
        if not self._k:
            return scores
        queries, columns = np.nonzero((found >= 0) & (rough >= rough[:, self._k - 1, None] - 2 * self._error))
        for s in range(0, len(queries), RESCORE_PAIRS):
            query, column = queries[s : s + RESCORE_PAIRS], columns[s : s + RESCORE_PAIRS]
            scores[query, column] = similarity(self._vectors[query], self._rows.vectors[found[query, column]])
        return scores

    def _again(self, unsure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for some queries with more candidates."""
        wider = Scan(self._rows, self._vectors[unsure], self._k, width=8 * self._width)
        position = np.full(len(self._vectors), -1, np.int64)
        position[unsure] = np.arange(len(unsure))
        for queries, first, last in self._seen:
            chosen = position[queries]
            if (chosen >= 0).any():
                wider.compare(chosen[chosen >= 0], first, last)
        return wider.nearest()


def tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor that shares the array's memory; it is only read, so an array that may not be written is as good."""
    array = np.ascontiguousarray(array)
    if array.flags.writeable:
        return torch.from_numpy(array)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _count_rows(mask: torch.Tensor) -> np.ndarray:
    """True values in each row, int32. As bytes: three times as fast as a sum of bools."""
    return mask.view(torch.uint8).sum(1, dtype=torch.int32).cpu().numpy()


def _places(mask: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each true value. On a CPU by numpy, which is eight times as fast where they are few."""
    if mask.device.type == "cpu":
        return np.divmod(np.flatnonzero(mask.numpy()), mask.shape[1])
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return rows.cpu().numpy(), columns.cpu().numpy()
