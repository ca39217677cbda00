"""The stream of training samples from object storage, in the order of cluster/order.py: fetched and decoded ahead of the step."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cluster.dataset import Dataset, NotADataset
from cluster.embedding import Embeddings, read_embeddings
from cluster.lookahead import ahead_map
from cluster.order import Plan, read_counts, shard_order
from cluster.picture import PictureError, decode
from cluster.shard import Rejected, Sample, ShardError, read_samples
from cluster.store import NotFound, StoreError, join_url
from facemae.training import Batch


class StreamError(ValueError):
    """Training data that cannot be streamed as asked: missing embeddings, a picture that does not decode."""


def require_embeddings(dataset: Dataset, recognizer: str, sha256: str, command: str) -> None:
    """Check that a data set was embedded whole by the recogniser that trains.

    Args:
        recognizer: its name, the folder of the embeddings.
        sha256: of its ONNX file.
        command: what to run when they are missing.

    Raises:
        StreamError: there are none, they are another recogniser's, or they do not cover the data set.
    """
    embeddings = dataset.embeddings(recognizer)
    try:
        found = embeddings.description()["lineage"]["config"]["recognizer"]["sha256"]
        counts = read_counts(embeddings)
    except (StoreError, KeyError) as error:
        if isinstance(error, StoreError) and not isinstance(error, NotFound | NotADataset):
            raise
        raise StreamError(
            f"the loss needs the originals' embeddings, and {embeddings.url} holds no complete set: run\n  {command}"
        ) from None
    if found != sha256:
        raise StreamError(
            f"{embeddings.url} was made by another recogniser of the same name (sha256 {found[:12]}, not {sha256[:12]}): "
            f"give the recogniser another name, then run\n  {command}"
        )
    missing = sorted(set(read_counts(dataset)) - set(counts))
    if missing:
        raise StreamError(
            f"{embeddings.url} does not cover shard {missing[0][0]} of {dataset.url}: delete the embeddings and run\n  {command}"
        )


@dataclass(frozen=True)
class _Row:
    """A sample with its embedding, (dim,) or None."""

    sample: Sample
    embedding: np.ndarray | None


class Stream:
    """The batches of one rank, fetched and decoded ahead of the step.

    Memory: for each lane of the rank the shard being read and up to two more, and ``threads + 1`` decoded batches.

    Args:
        dataset: the originals.
        plan: the order.
        recognizer: whose embeddings come with the batches, or None for none.
        rank, world_size: which lanes are ours.
        threads: batches decoded at the same time.

    Raises:
        OrderError: the world size does not divide the lanes.
    """

    def __init__(self, dataset: Dataset, plan: Plan, recognizer: str | None = None, rank: int = 0, world_size: int = 1, threads: int = 1):
        self._dataset, self._plan, self._threads = dataset, plan, threads
        self._embeddings = dataset.embeddings(recognizer) if recognizer else None
        self._lanes = plan.lanes_of(rank, world_size)

    def batches(self, first: int, last: int) -> Generator[Batch, None, None]:
        """The rank's part of the global steps ``first`` to ``last`` (exclusive): one Batch a step, never empty.

        Raises:
            StreamError: a sample has no embedding or does not decode; ShardError, StoreError: a shard cannot be read.
        """
        # two pools: a decoder that waited for a shard in its own pool could wait for itself
        with ThreadPoolExecutor(len(self._lanes), "fetch") as fetchers, ThreadPoolExecutor(self._threads, "decode") as decoders:
            try:
                lanes = [self._pieces(lane, first, last, fetchers) for lane in self._lanes]
                yield from ahead_map(decoders, self._decode, zip(range(first, last), *lanes, strict=True), self._threads)
            finally:
                for pool in (fetchers, decoders):
                    pool.shutdown(wait=False, cancel_futures=True)

    def _pieces(self, lane: int, first: int, last: int, pool: ThreadPoolExecutor) -> Iterator[list[_Row]]:
        """A lane's rows, step by step; the next shard is fetched while this one is used."""
        loads = ahead_map(pool, self._load, self._plan.visits(lane, first, last), ahead=1)
        here, rows = None, list[_Row]()
        for step in range(first, last):
            piece = list[_Row]()
            for segment in self._plan.segments(lane, step):
                if (segment.epoch, segment.shard) != here:
                    here, rows = (segment.epoch, segment.shard), next(loads)
                piece += rows[segment.start : segment.stop]
            yield piece

    def _load(self, visit: tuple[int, str]) -> list[_Row]:
        """A shard's rows in the epoch's order."""
        epoch, shard = visit
        samples = _usable(read_samples(self._dataset.read(self._dataset.manifest(shard))), join_url(self._dataset.url, shard))
        if len(samples) != self._plan.counts[shard]:
            raise ShardError(
                f"shard {shard} of {self._dataset.url} holds {len(samples)} samples, not what its index says: run facemae verify"
            )
        vectors = self._vectors(shard, samples)
        order = shard_order([sample.identity for sample in samples], self._plan.images_per_identity, self._plan.seed, epoch, shard)
        return [_Row(samples[i], None if vectors is None else vectors[i]) for i in order]

    def _vectors(self, shard: str, samples: Sequence[Sample]) -> np.ndarray | None:
        """The samples' embeddings, float32 (N, dim), joined by key."""
        if self._embeddings is None:
            return None
        try:
            rows = read_embeddings(self._embeddings.read(self._embeddings.manifest(shard)))
        except NotFound:
            raise StreamError(f"{self._embeddings.url} has no shard {shard}: {_EMBED}") from None
        return rows.vectors[_places(rows, samples, f"{self._embeddings.url}, shard {shard}")].astype(np.float32)

    def _decode(self, work: tuple[int, *tuple[list[_Row], ...]]) -> Batch:
        step, *pieces = work
        rows = [row for piece in pieces for row in piece]
        identities = np.array([row.sample.identity for row in rows], np.int64)
        vectors = None if self._embeddings is None else np.stack([row.embedding for row in rows if row.embedding is not None])
        images = np.stack([_picture(row.sample) for row in rows])
        return Batch(images, [row.sample.key for row in rows], identities, vectors, step // self._plan.steps_per_epoch)


_EMBED = "run `facemae embed` on the data set with the recogniser of the loss"


def _usable(samples: Iterator[Sample | Rejected], where: str) -> list[Sample]:
    found = list[Sample]()
    for sample in samples:
        if isinstance(sample, Rejected):
            raise StreamError(f"{where}: the sample {sample.key} cannot be used ({sample.error}): ingest the data set again")
        found.append(sample)
    return found


def _places(rows: Embeddings, samples: Sequence[Sample], where: str) -> np.ndarray:
    """Where each sample's embedding is."""
    place = {key: i for i, key in enumerate(rows.keys)}
    try:
        return np.array([place[sample.key] for sample in samples], np.int64)
    except KeyError as error:
        raise StreamError(f"{where}: no embedding for {error}: {_EMBED}") from None


def _picture(sample: Sample) -> np.ndarray:
    try:
        return decode(sample.image)
    except PictureError as error:
        raise StreamError(f"the picture of {sample.key} does not decode ({error}): run `facemae verify` on the data set") from None
