"""Pictures of a shard in batches: decoded ahead in threads, for every processor that looks at images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np

from cluster.picture import SIZE, PictureError, decode
from cluster.shard import Rejected, Sample

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Batch:
    """Samples with their pictures, uint8 (N, 112, 112, 3) RGB, and the ones that did not decode."""

    samples: Sequence[Sample]
    pictures: np.ndarray
    rejected: Sequence[Rejected]


def decoded(samples: Iterable[Sample | Rejected], batch_size: int, pool: Executor | None, ahead: int) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` samples in order, decoded in ``pool`` up to ``ahead`` batches before they are asked for."""
    return ahead_map(pool, _decode_batch, chunks(samples, batch_size), ahead)


def codec_pool(threads: int) -> Executor | None:
    """Threads that decode and encode beside the device; none for a worker of one core, where they would only take turns with it."""
    return ThreadPoolExecutor(threads, "codec") if threads > 1 else None


def ahead_map(pool: Executor | None, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """``map`` in a pool, in order, with at most ``ahead`` results waiting: memory is bounded, unlike ``Executor.map``'s. Without a pool
    each result is made when it is asked for."""
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _decode_batch(samples: Sequence[Sample | Rejected]) -> Batch:
    kept, rejected = list[Sample](), list[Rejected]()
    pictures = np.empty((len(samples), SIZE, SIZE, 3), np.uint8)
    for sample in samples:
        if isinstance(sample, Rejected):
            rejected.append(sample)
            continue
        try:
            decode(sample.image, pictures[len(kept)])
            kept.append(sample)
        except PictureError as error:
            rejected.append(Rejected(sample.key, error.reason, str(error), len(sample.image), sample.source))
    return Batch(kept, pictures[: len(kept)], rejected)
