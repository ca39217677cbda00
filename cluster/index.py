"""A gallery of embeddings held by Ray actors and searched together, the same answer however they are divided.

Each actor reads its part of the gallery from the store by name; vectors and keys never pass through the driver. Every image has a global
number, its shard's first number + its row, so that an answer is a few small arrays.

A small gallery is compared with every query, shard by shard. A large one is an index of cells (cluster.index_build): an actor owns a run of
cells, and a query goes only to the owners of the cells it probes. What is compared is compared exactly (facemae.scan), so the answer does
not depend on the number of actors, threads or queries at once, nor on CPU or GPU; what lies in cells that are not probed is not seen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from cluster.dataset import Dataset
from cluster.embedded import GalleryError
from cluster.index_choice import choose
from cluster.index_plan import Plan
from cluster.neighbours import Neighbours
from cluster.node import num_working
from cluster.routing import Route, route
from cluster.task import answer_of

if TYPE_CHECKING:
    from cluster.quantizer import Quantizer

MAX_RESTARTS = 3
"""Times that one actor is rebuilt from the store after its process or node was lost."""
BLOCK_QUERIES, BLOCK_PROBES = 16384, 1 << 21
"""Queries, and cells that they probe together, which are routed at once. They change no result: the more queries a cell is compared with at
once, the faster; what is routed together is in this process's memory."""


@dataclass(frozen=True)
class GalleryOptions:
    """How a gallery is searched and spread. Only ``factory`` and ``recall`` can change a result, and only where cells are left out.

    Attributes:
        factory: "auto" (every image up to 262,144 of them, cells beyond), "Flat", or "IVF<cells>,<codes>" as FAISS writes it.
        recall: share of queries for which what is asked (cluster.calibration) is answered as by an exact search.
        num_actors: 0 takes one a node, and as many as it needs for none to hold more than 4 GiB.
        cpus_per_actor: CPU cores that Ray sets aside for each. 0 by default: an actor waits whenever the stage's workers compute and works
            whenever they wait, and cores set aside for a gallery on a small cluster would leave none to the workers, which then never
            start. On a large cluster, set it to the threads of an actor.
        gpus_per_actor: GPUs of each, fractions allowed.
        threads: of each; 0 divides the cluster's cores.
    """

    factory: str = "auto"
    recall: float = 0.99
    num_actors: int = 0
    cpus_per_actor: float = 0.0
    gpus_per_actor: float = 0.0
    threads: int = 0


class Gallery:
    """The gallery as the driver and the stage's workers hold it: the numbering, the cells and, once loaded, the actors. Picklable; it holds
    no embedding. Use it as a context manager, or ``close`` it.

    Args:
        embeddings: a data set of embedding shards.
        dim: their length.
        options: how it is searched and spread.

    Attributes:
        choice: the index that was chosen.
        num_probes: cells that a query probes; all of them until cluster.calibration found a smaller number.

    Raises:
        GalleryError: the data set holds no embeddings, or the actors would take every core of the cluster.
        ValueError: ``options.factory`` names no index.
    """

    def __init__(self, embeddings: Dataset, dim: int, options: GalleryOptions | None = None) -> None:
        manifests = [manifest for manifest in embeddings.manifests() if manifest.samples]
        if not manifests:
            raise GalleryError(f"{embeddings.url} holds no embeddings: run `facemae embed` on the set")
        self.url, self.dim, self._options = embeddings.url, dim, options or GalleryOptions()
        self.names = [manifest.shard for manifest in manifests]
        self._starts = np.cumsum([0, *(manifest.samples for manifest in manifests)])
        nodes = num_working()
        self.choice = choose(len(self), dim, factory=self._options.factory, num_actors=self._options.num_actors, num_nodes=nodes)
        self.num_probes = self.choice.num_cells
        self._num_actors = min(self.choice.num_actors, self.choice.num_parts or len(manifests))
        self._actors: list[Any] = []
        self._cells: Quantizer | None = None
        _require_room(self._num_actors, self._options)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def recall(self) -> float:
        """That of the options."""
        return self._options.recall

    @property
    def exact(self) -> bool:
        """Whether every search sees every image."""
        return self.num_probes == self.choice.num_cells and not self.choice.coded

    def start(self, shard: str) -> int:
        """The global number of a shard's first row. Raises GalleryError when the gallery has no such shard."""
        place = bisect_left(self.names, (len(shard), shard), key=lambda name: (len(name), name))
        if place == len(self.names) or self.names[place] != shard:
            raise GalleryError(f"{self.url} has no embeddings of shard {shard}: run `facemae embed` on the set")
        return int(self._starts[place])

    def load(self) -> None:
        """Build the index where there is to be one and it is not stored, start the actors, where they are not there yet, and wait until
        each holds its part. Ray must be connected.

        Raises:
            GalleryError: a shard is not what it should be.
            StoreError, StageError, Interrupted: as run_stage.
        """
        if self._actors:
            return
        from cluster.index_shard import IndexShard  # torch: a worker that only asks does without

        plan, slots = self._parts()
        remote = ray.remote(IndexShard).options(
            num_cpus=self._options.cpus_per_actor,
            num_gpus=self._options.gpus_per_actor,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
            scheduling_strategy="SPREAD",
        )
        threads = self._options.threads or max(1, int(ray.cluster_resources().get("CPU", 1) // len(slots)))
        self._actors = [remote.remote(plan, mine, threads) for mine in slots]
        held = _answers([actor.identities.remote() for actor in self._actors])
        self._identities = ray.put(held)

    def _parts(self) -> tuple[Plan, list[list[tuple[str, int]]]]:
        """What the actors are made of, and what each one holds."""
        if self.choice.exact:
            homes = _deal(np.diff(self._starts).tolist(), self._num_actors)
            slots = [(name, int(start)) for name, start in zip(self.names, self._starts, strict=False)]
            return Plan(self.url, self.dim), [[slots[i] for i in np.flatnonzero(homes == actor)] for actor in range(self._num_actors)]
        from cluster.index_build import build_index
        from cluster.quantizer import cut

        embeddings = Dataset(self.url, ".parquet")
        plan, self._cells = build_index(
            embeddings, self.names, self._starts, self.dim, self.choice, gpus=min(self._options.gpus_per_actor, 1)
        )
        index = Dataset(plan.url, ".parquet")
        sizes = np.array([manifest.samples for manifest in index.manifests()])
        homes = cut(sizes, self._num_actors)
        self._owner = homes[self._cells.part]
        return plan, [[(f"{part:05d}", 0) for part in np.flatnonzero(homes == actor)] for actor in range(int(homes.max()) + 1)]

    def search(self, vectors: np.ndarray, k: int, thresholds: np.ndarray | None = None, exact: bool = False, wider: int = 1) -> Neighbours:
        """The most similar gallery images to each query, and how many are nearer than a threshold.

        Args:
            vectors: float16 or float32 (Q, dim) unit rows.
            k: how many to find; 0 for counts alone.
            thresholds: float32 (Q, T), similarities; NaN counts nothing.
            exact: see every image, whatever the index.
            wider: probe so many times ``num_probes`` cells.

        Raises:
            GalleryError: a shard is not what it should be, or actors keep dying.
        """
        self.load()
        thresholds = np.empty((len(vectors), 0), np.float32) if thresholds is None else thresholds
        found = Neighbours.none(len(vectors), k, thresholds.shape[1])
        if exact or self.exact:
            shared, everyone = ray.put(vectors), np.arange(len(vectors))
            calls = [(everyone, actor.search.remote(shared, k, thresholds, None)) for actor in self._actors]
        else:
            calls = list(self._calls(vectors, k, thresholds, min(wider * self.num_probes, self.choice.num_cells)))
        for (queries, _), answer in zip(calls, _answers([call for _, call in calls]), strict=True):
            found.add(queries, *answer)
        return found

    def _calls(self, vectors: np.ndarray, k: int, thresholds: np.ndarray, num_probes: int) -> Iterator[tuple[np.ndarray, ray.ObjectRef]]:
        """Ask the owners of the probed cells, block by block: they search one while the cells of the next are looked up here."""
        size = min(BLOCK_QUERIES, max(1, BLOCK_PROBES // num_probes))
        for start in range(0, len(vectors), size):
            block, limits = vectors[start : start + size], thresholds[start : start + size]
            for r in self.routes(block, num_probes):
                search = self._actors[r.owner].search
                yield start + r.queries, search.remote(block[r.queries], k, limits[r.queries], r.cells)

    def routes(self, vectors: np.ndarray, num_probes: int) -> list[Route]:
        """Who is asked for which cells. Raises ValueError for an index without cells."""
        if self._cells is None:
            raise ValueError(f"{self.choice.factory} has no cells, or the gallery is not loaded")
        return list(route(self._cells.nearest(vectors, num_probes), self._owner))

    def same_identity(self, vectors: np.ndarray, identities: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gallery images of each query's identity but the one numbered ``left_out``: always all of them, exactly.

        Args:
            vectors: as in ``search``.
            identities: int64 (Q,).
            left_out: int64 (Q,), global numbers, -1 for none.

        Returns:
            How many there are, int64 (Q,), and the highest similarity, float32 (Q,), NaN where there is none.
        """
        self.load()
        queries = [np.flatnonzero(np.isin(identities, held)) for held in ray.get(self._identities)]
        calls = [
            (chosen, actor.same_identity.remote(vectors[chosen], identities[chosen], left_out[chosen]))
            for actor, chosen in zip(self._actors, queries, strict=True)
            if len(chosen)
        ]
        total, best = np.zeros(len(vectors), np.int64), np.full(len(vectors), -np.inf, np.float32)
        for (chosen, _), (counts, highest) in zip(calls, _answers([call for _, call in calls]), strict=True):
            total[chosen] += counts
            best[chosen] = np.maximum(best[chosen], highest)
        return total, np.where(total > 0, best, np.float32(np.nan))

    def close(self) -> None:
        """End the actors."""
        while self._actors:
            ray.kill(self._actors.pop())

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _answers(calls: Sequence[ray.ObjectRef]) -> list[Any]:
    try:
        return list(answer_of(list(calls)))
    except RayActorError as error:
        raise GalleryError(f"a gallery actor died more than {MAX_RESTARTS} times ({error}): give it memory, or use more actors") from None


def _deal(sizes: Sequence[int], num_actors: int) -> np.ndarray:
    """The actor of each shard, int64: the largest shards first, dealt round and back so that all hold about as much."""
    turn = np.concatenate([np.arange(num_actors), np.arange(num_actors)[::-1]])
    homes = np.empty(len(sizes), np.int64)
    homes[np.argsort(-np.asarray(sizes), kind="stable")] = np.resize(turn, len(sizes))
    return homes


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
