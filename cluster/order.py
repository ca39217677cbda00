"""The order of training samples.

It is a pure function of (seed, epoch, shard names and counts, labels). A fixed number of lanes divides it, not the number of workers,
so a global step holds the same samples on any number of ranks, and a run resumes at a step by arithmetic: nothing is repeated and
nothing is skipped.

    epoch -> shards permuted, samples laid end to end
          -> lanes: equal contiguous ranges            (rank r of R owns lanes r, r + R, ...)
          -> steps: each lane's range in equal pieces  (global batch = one piece of every lane)

Everything is cut between tuples of ``images_per_identity`` samples, and inside a shard the tuples hold one identity each, so that the
relation graph of a batch has genuine and impostor edges.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

from cluster.dataset import Dataset


class OrderError(ValueError):
    """An order that cannot be: too few samples, or a batch, lanes and workers that do not divide."""


@dataclass(frozen=True)
class Segment:
    """Places ``start`` to ``stop`` (exclusive) of a shard's order in one epoch."""

    epoch: int
    shard: str
    start: int
    stop: int


def require_tuples(batch_size: int, images_per_identity: int, lanes: int) -> None:
    """Raise OrderError unless a batch is a whole number of tuples in every lane."""
    unit = lanes * images_per_identity
    if min(lanes, images_per_identity, batch_size) < 1 or batch_size % unit:
        raise OrderError(
            f"a batch of {batch_size} does not divide into {lanes} lanes of whole tuples of {images_per_identity} "
            f"images: give a multiple of lanes x images per identity = {unit}"
        )


@dataclass(frozen=True)
class Plan:
    """Who reads what, and when: all of it follows from these fields.

    Attributes:
        shards: (name, number of samples) of every shard, in the order of the data set.
        batch_size: samples of a global batch; a step holds this many or a few less.
        images_per_identity: K, samples of one identity that stay together.
        lanes: into how many streams an epoch is divided; the number of workers must divide it.
        seed: of the order.

    Raises:
        OrderError: the batch is no whole number of tuples a lane, or the data set has too few samples.
    """

    shards: tuple[tuple[str, int], ...]
    batch_size: int
    images_per_identity: int = 4
    lanes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        require_tuples(self.batch_size, self.images_per_identity, self.lanes)
        if self.num_tuples < self.lanes:
            raise OrderError(
                f"{self.num_samples} samples are too few for {self.lanes} lanes of tuples of {self.images_per_identity}: "
                "use more data, fewer lanes or fewer images per identity"
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return sum(count for _, count in self.shards)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Samples of each shard, by name."""
        return dict(self.shards)

    @cached_property
    def num_tuples(self) -> int:
        """Tuples of an epoch, the last one perhaps short."""
        return -(-self.num_samples // self.images_per_identity)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch: enough for every lane's share of the batch, never so many that a lane has nothing for a step."""
        longest = -(-self.num_tuples // self.lanes)
        per_step = self.batch_size // (self.lanes * self.images_per_identity)
        return min(-(-longest // per_step), self.num_tuples // self.lanes)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes that a rank reads. Raises OrderError when the world size does not divide the lanes."""
        if self.lanes % world_size:
            raise OrderError(f"{world_size} workers do not divide {self.lanes} lanes: choose a number of workers that does, or set --lanes")
        return range(rank, self.lanes, world_size)

    def samples_before(self, step: int) -> int:
        """Samples of all global steps before ``step``, counted from the start of training."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        return epoch * self.num_samples + sum(self._piece(lane, rest)[0] - self._piece(lane, 0)[0] for lane in range(self.lanes))

    def segments(self, lane: int, step: int) -> list[Segment]:
        """What a lane contributes to a global step, in order."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        start, stop = self._piece(lane, rest)
        names, ends = self._layout(epoch)
        found = list[Segment]()
        for i in range(int(np.searchsorted(ends, start, side="right")), len(names)):
            begin = int(ends[i - 1]) if i else 0
            if begin >= stop:
                break
            if ends[i] > begin:
                found.append(Segment(epoch, names[i], max(start, begin) - begin, min(stop, int(ends[i])) - begin))
        return found

    def visits(self, lane: int, first: int, last: int) -> Iterator[tuple[int, str]]:
        """The (epoch, shard) pairs that a lane needs for the global steps ``first`` to ``last`` (exclusive), in order, each once."""
        before = None
        for step in range(first, last):
            for segment in self.segments(lane, step):
                if (segment.epoch, segment.shard) != before:
                    before = (segment.epoch, segment.shard)
                    yield before

    def _piece(self, lane: int, rest: int) -> tuple[int, int]:
        """Places in the epoch of a lane's piece of the epoch's step ``rest``, cut between tuples."""
        low, high = self.num_tuples * lane // self.lanes, self.num_tuples * (lane + 1) // self.lanes
        cuts = (low + (high - low) * i // self.steps_per_epoch for i in (rest, rest + 1))
        start, stop = (min(cut * self.images_per_identity, self.num_samples) for cut in cuts)
        return start, stop

    def _layout(self, epoch: int) -> tuple[list[str], np.ndarray]:
        """Shard names in the epoch's order, and where each ends: int64 (number of shards,)."""
        if epoch not in self._layouts:
            order = sorted(self.counts, key=lambda name: (_digest(self.seed, epoch, name), name))
            ends = np.cumsum([self.counts[name] for name in order], dtype=np.int64)
            for old in sorted(self._layouts)[:-2]:  # lanes stand in neighbouring epochs at most
                self._layouts.pop(old, None)
            self._layouts[epoch] = order, ends
        return self._layouts[epoch]

    @cached_property
    def _layouts(self) -> dict[int, tuple[list[str], np.ndarray]]:
        return {}


def shard_order(labels: Sequence[int], images_per_identity: int, seed: int, epoch: int, shard: str) -> np.ndarray:
    """The order of a shard's samples in one epoch: shuffled tuples of one identity each, then what does not fill a tuple.

    Args:
        labels: the identities of the shard's N samples.
        images_per_identity: K, the length of a tuple.

    Returns:
        int64 (N,): a permutation; places 0 to K - 1 are the first tuple, and so on.
    """
    random = np.random.default_rng(int.from_bytes(_digest(seed, epoch, shard), "little"))
    shuffled = random.permutation(len(labels))
    _, identity, sizes = np.unique(np.asarray(labels, np.int64)[shuffled], return_inverse=True, return_counts=True)
    grouped = np.argsort(identity, kind="stable")  # places in shuffled, one identity after the other
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the identity
    full = rank < np.repeat(sizes // images_per_identity * images_per_identity, sizes)
    tuples = grouped[full].reshape(-1, images_per_identity)
    left = grouped[~full]
    left = left[np.argsort(random.permutation(len(sizes))[identity[left]], kind="stable")]  # what is left of one identity stays together
    return shuffled[np.concatenate([tuples[random.permutation(len(tuples))].reshape(-1), left])].astype(np.int64)


def read_counts(dataset: Dataset) -> tuple[tuple[str, int], ...]:
    """(name, samples) of every shard of a complete data set, from its index: one object instead of a manifest for each shard.

    Raises:
        StoreError: the data set is unfinished, or there is none.
    """
    dataset.description()
    shards = json.loads(dataset.store.get("index.json"))["shardlist"]
    return tuple((shard["url"].rpartition("/")[2].partition("-")[0], int(shard["nsamples"])) for shard in shards)


def _digest(seed: int, epoch: int, shard: str) -> bytes:
    return blake2b(f"{seed}/{epoch}/{shard}".encode(), digest_size=16).digest()
