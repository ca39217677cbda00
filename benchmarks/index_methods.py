"""The methods of benchmarks/index.py. One process runs one of them: it builds, tunes, and then searches as often as it is told to.

    python -m benchmarks.index_methods METHOD FOLDER OPTIONS      # one line of JSON when built; then one for each line "search" it reads

FOLDER holds gallery.npy and queries.npy, float16 unit rows; once the truth is known, truth.npy, int64 numbers of the nearest; and for ours
the gallery as a data set of embedding shards. Only numpy and FAISS are imported at the top: autofaiss needs an environment of its own.
"""

from __future__ import annotations

import json
import math
import sys
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

BLOCK = 1 << 16
TUNING_QUERIES = 4000
TRAINED_ON = 64
"""Vectors a cell that the peers' quantiser is trained on (FAISS's guidelines: 30 to 256)."""


@dataclass(frozen=True)
class Options:
    """What all methods are given alike.

    Attributes:
        k: neighbours a query.
        threads: in all.
        recall: share of queries whose nearest must be found.
        cells: of every index of cells; 0 takes for ours what cluster.index_choice would, for FAISS 4 sqrt(N), as its guidelines have it.
        batch: queries that ours are given at once, a shard of the default size; the peers get all.
    """

    k: int = 1
    threads: int = 2
    recall: float = 0.99
    cells: int = 0
    batch: int = 10_000


class Method(ABC):
    """A way to find neighbours. ``setting`` says what it chose."""

    setting = ""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
        faiss.omp_set_num_threads(options.threads)
        self.gallery = np.load(folder / "gallery.npy", mmap_mode="r")
        self.queries = np.load(folder / "queries.npy")

    def build(self) -> None:  # noqa: B027  # some have nothing to do
        """Read the gallery and make ready to search."""

    def tune(self) -> None:  # noqa: B027
        """Choose the least work that reaches the recall; also warms up."""

    @abstractmethod
    def search(self, queries: np.ndarray) -> np.ndarray:
        """Numbers of the nearest, int64 (Q, k)."""

    def close(self) -> None:  # noqa: B027
        """Let go of what was started."""

    def recall(self, found: np.ndarray) -> float:
        """Share of the first queries whose nearest, or one exactly as near, is in the first column."""
        queries, truth = self.queries[: len(found)], np.load(self.folder / "truth.npy")[: len(found)]
        scores = [np.einsum("qd,qd->q", queries, self.gallery[rows], dtype=np.float64) for rows in (found[:, 0], truth)]
        return float(np.mean(scores[0] >= scores[1]))


class Exact(Method):
    """faiss.contrib.exhaustive_search.knn_ground_truth, block by block."""

    setting = "exact"

    def search(self, queries: np.ndarray) -> np.ndarray:
        """The truth."""
        from faiss.contrib.exhaustive_search import knn_ground_truth

        blocks = (self.gallery[start : start + BLOCK].astype(np.float32) for start in range(0, len(self.gallery), BLOCK))
        return knn_ground_truth(queries.astype(np.float32), blocks, self.options.k, faiss.METRIC_INNER_PRODUCT, ngpu=0)[1]


class IvfFlat(Method):
    """faiss.IndexIVFFlat as its guidelines have it: trained on a sample, filled block by block, nprobe found by trial."""

    def build(self) -> None:
        """Train and add."""
        total, dim = self.gallery.shape
        cells = self.options.cells or round(4 * math.sqrt(total))
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        rows = np.sort(np.random.default_rng(0).permutation(total)[: TRAINED_ON * cells])
        self.index.train(self.gallery[rows].astype(np.float32))
        for start in range(0, total, BLOCK):
            self.index.add(self.gallery[start : start + BLOCK].astype(np.float32))

    def tune(self) -> None:
        """The smallest nprobe that reaches the recall."""
        nprobe = self._least(self.index.nlist)
        self.setting = f"IVF{self.index.nlist},Flat nprobe={nprobe}"

    def search(self, queries: np.ndarray) -> np.ndarray:
        """FAISS's own search of the whole batch."""
        return self.index.search(queries.astype(np.float32), self.options.k)[1]

    def _set(self, effort: int) -> None:
        self.index.nprobe = effort

    def _least(self, most: int) -> int:
        """By doubling, then halving the interval; left set."""

        def enough(effort: int) -> bool:
            self._set(effort)
            return self.recall(IvfFlat.search(self, self.queries[:TUNING_QUERIES])) >= self.options.recall

        high = 1
        while high < most and not enough(high):
            high *= 2
        low, high = high // 2, min(high, most)
        while high - low > max(1, high // 32):
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        self._set(high)
        return high


class BigBatch(IvfFlat):
    """faiss.contrib.big_batch_search over the same index: all queries of a cell at once."""

    def search(self, queries: np.ndarray) -> np.ndarray:
        """Cell by cell; the next is fetched while one is computed."""
        from faiss.contrib.big_batch_search import big_batch_search

        return big_batch_search(self.index, queries.astype(np.float32), self.options.k, method="knn_function", threaded=1)[1]


class AutoFaiss(IvfFlat):
    """autofaiss.build_index with its defaults; what it left to tune (efSearch or nprobe) is then tuned to the recall."""

    def build(self) -> None:
        """Its own choice of index, from the vectors as files."""
        import autofaiss

        vectors = self.folder / "float32"
        if not vectors.exists():
            vectors.mkdir()
            np.save(vectors / "0.npy", self.gallery[:].astype(np.float32))
        self.index, infos = autofaiss.build_index(
            str(vectors), save_on_disk=False, metric_type="ip", nb_cores=self.options.threads, verbose=40
        )
        assert self.index is not None
        faiss.omp_set_num_threads(self.options.threads)
        self.key = (infos or {}).get("index_key", type(self.index).__name__)

    def tune(self) -> None:
        """The least efSearch or nprobe that reaches the recall."""
        ivf = faiss.try_extract_index_ivf(self.index)
        self.parameter = "nprobe" if ivf else "efSearch"
        self.setting = f"{self.key} {self.parameter}={self._least(ivf.nlist if ivf else 4096)}"

    def _set(self, effort: int) -> None:
        faiss.ParameterSpace().set_index_parameters(self.index, f"{self.parameter}={effort}")


class Ours(Method):
    """cluster.index.Gallery: as many actors of one thread as there are threads, on a local Ray."""

    factory = "auto"

    def build(self) -> None:
        """Read, train, divide, load; Ray is there already, as it is in any job."""
        from cluster.dataset import Dataset
        from cluster.index import Gallery, GalleryOptions
        from cluster.index_choice import num_cells_for

        factory = f"IVF{self.options.cells or num_cells_for(len(self.gallery))},SQfp16" if self.factory == "cells" else self.factory
        options = GalleryOptions(factory, self.options.recall, num_actors=self.options.threads, threads=1)
        self.index = Gallery(Dataset(str(self.folder / "shards"), ".parquet"), self.queries.shape[1], options)
        self.index.load()

    def tune(self) -> None:
        """As many cells as the recall needs; also warms up."""
        from cluster.calibration import Question, calibrate

        calibrate(self.index, Question(self.queries[:TUNING_QUERIES]))
        self.search(self.queries[:TUNING_QUERIES])
        self.setting = f"{self.index.choice.factory} nprobe={self.index.num_probes}" if self.index.num_probes else "exact"

    def search(self, queries: np.ndarray) -> np.ndarray:
        """Batches as a stage's workers send them, two on their way at once."""
        batches = [queries[start : start + self.options.batch] for start in range(0, len(queries), self.options.batch)]
        with ThreadPoolExecutor(2) as pool:
            return np.concatenate(list(pool.map(lambda batch: self.index.search(batch, self.options.k).ids, batches)))

    def close(self) -> None:
        """End the actors and Ray."""
        import ray

        self.index.close()
        ray.shutdown()


class OursInCells(Ours):
    """With cells, also where the gallery is so small that it would be compared whole."""

    factory = "cells"


class OursExact(Ours):
    """Every image compared with every query."""

    factory = "Flat"


METHODS: dict[str, type[Method]] = {
    "ours": OursInCells,
    "ivfflat": IvfFlat,
    "big_batch": BigBatch,
    "autofaiss": AutoFaiss,
    "ours exact": OursExact,
    "exact": Exact,
}


def main() -> None:
    """Build, then serve."""
    name, folder, options = sys.argv[1], Path(sys.argv[2]), Options(**json.loads(sys.argv[3]))
    method = METHODS[name](folder, options)
    if isinstance(method, Ours):
        _start_ray(options.threads)
    _, seconds = _timed(method.build)
    _, tuning = _timed(method.tune)
    _say({"build": seconds, "tune": tuning, "setting": method.setting})
    for _ in sys.stdin:
        found, seconds = _timed(lambda: method.search(method.queries))
        if name == "exact":
            np.save(folder / "truth.npy", found[:, 0])
        _say({"search": seconds, "recall": method.recall(found)})
    method.close()


def _start_ray(num_cpus: int) -> None:
    import ray

    ray.init(num_cpus=num_cpus, include_dashboard=False, _node_ip_address="127.0.0.2", logging_level="ERROR")


def _timed(work: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _say(content: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
