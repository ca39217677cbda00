"""Working ahead in a pool: same order, bounded, errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cluster.lookahead import ahead_map, chunks, decoded
from cluster.picture import decode, encode
from cluster.shard import Rejected, Sample


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_results_come_in_order_whatever_ends_first(ahead: int, count: int):
    def slow(i: int) -> int:
        time.sleep(0.003 * (i % 3 == 0))
        return i * i

    with ThreadPoolExecutor(4) as pool:
        assert list(ahead_map(pool, slow, range(count), ahead)) == [i * i for i in range(count)]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_no_more_than_ahead_results_wait(ahead: int):
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for i in range(50):
            taken = i + 1
            yield i

    with ThreadPoolExecutor(2) as pool:
        results = ahead_map(pool, lambda i: i, items(), ahead)
        assert taken == 0  # nothing begins before it is asked for
        for given_back, _ in enumerate(results, 1):
            assert taken - given_back <= ahead
    assert taken == 50


def test_work_overlaps():
    meeting = threading.Barrier(3, timeout=10)
    with ThreadPoolExecutor(3) as pool:
        assert len(list(ahead_map(pool, lambda _: meeting.wait(), range(3), 2))) == 3  # breaks unless three run at once


def test_an_error_comes_in_its_place():
    def fail(i: int) -> int:
        if i == 5:
            raise KeyError(i)
        return i

    with ThreadPoolExecutor(4) as pool:
        results = ahead_map(pool, fail, range(20), 3)
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(KeyError):
            next(results)


def test_an_error_of_the_items_is_not_swallowed():
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="disk"):
        list(ahead_map(pool, lambda i: i, items(), 3))


@pytest.mark.parametrize(("count", "size", "sizes"), [(0, 3, []), (2, 3, [2]), (6, 3, [3, 3]), (7, 3, [3, 3, 1])])
def test_chunks(count: int, size: int, sizes: list[int]):
    found = list(chunks(iter(range(count)), size))
    assert list(map(len, found)) == sizes
    assert [i for chunk in found for i in chunk] == list(range(count))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_decoded_batches_hold_every_sample_once(batch_size: int):
    pictures = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.full((1, 112, 112, 3), 20, np.uint8)
    samples: list[Sample | Rejected] = [Sample(f"k{i}", encode(picture), i, "src") for i, picture in enumerate(pictures)]
    samples[4] = Sample("k4", b"no jpeg", 4, "src")
    samples.insert(6, Rejected("r", "no-label", "none", 3))
    samples.append(Sample("last", samples[0].image[:-200], 1))  # type: ignore[union-attr]
    with ThreadPoolExecutor(2) as pool:
        batches = list(decoded(samples, batch_size, pool, 2))
    assert [sample.key for batch in batches for sample in batch.samples] == [f"k{i}" for i in range(10) if i != 4]
    assert [(row.key, row.reason) for batch in batches for row in batch.rejected] == [
        ("k4", "not-an-image"),
        ("r", "no-label"),
        ("last", "damaged-image"),
    ]
    assert all(batch.pictures.shape == (len(batch.samples), 112, 112, 3) and batch.pictures.dtype == np.uint8 for batch in batches)
    for batch in batches:
        for sample, picture in zip(batch.samples, batch.pictures, strict=True):
            assert np.array_equal(picture, decode(sample.image))
