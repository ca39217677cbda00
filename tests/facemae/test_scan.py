"""Blockwise comparison against the full matrix of float64 similarities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae import scan
from facemae.leakage import similarity
from facemae.scan import Rows, Scan


def unit_rows(count: int, seed: int = 0, dim: int = 48) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def full(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.stack([similarity(query[None], rows) for query in queries])


def search(
    rows: np.ndarray, queries: np.ndarray, k: int, thresholds: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = Scan(Rows(rows), queries, k, thresholds)
    found.compare(np.arange(len(queries)), 0, len(rows))
    return (*found.nearest(), found.nearer)


def assert_nearest(scores: np.ndarray, ids: np.ndarray, everything: np.ndarray, k: int) -> None:
    order = np.argsort(-everything, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(everything, order, 1))


@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 60), copies=st.integers(0, 20), k=st.integers(1, 70), block=st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_any_division_equals_the_full_matrix(seed: int, count: int, copies: int, k: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    rows, queries = unit_rows(count, seed, 8), unit_rows(9, seed + 1, 8)
    rows[rng.integers(count, size=copies)] = rows[0]
    queries[0] = rows[0]
    everything = full(queries, rows)
    thresholds = np.stack([everything[:, rng.integers(count)], np.full(9, np.nan, np.float32)], 1)  # ties with rows, counted as not nearer
    found = Scan(Rows(rows), queries, k, thresholds)
    for start in range(0, count, block):
        found.compare(np.arange(9), start, min(start + block, count))
    scores, ids = found.nearest()
    assert_nearest(scores[:, :count], ids[:, :count], everything, min(k, count))
    assert (ids[:, count:] == -1).all()
    np.testing.assert_array_equal(found.nearer, (everything[:, :, None] > thresholds[:, None, :]).sum(axis=1))
    assert (found.scanned == count).all()


def test_blocks_of_rows_and_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = unit_rows(1000), unit_rows(70, seed=1)
    everything = full(queries, rows)
    monkeypatch.setattr(scan, "BLOCK_ROWS", 96)
    monkeypatch.setattr(scan, "BLOCK_PAIRS", 96 * 16)
    thresholds = everything[:, 3:5]
    scores, ids, nearer = search(rows, queries, 11, thresholds)
    assert_nearest(scores, ids, everything, 11)
    np.testing.assert_array_equal(nearer, (everything[:, :, None] > thresholds[:, None, :]).sum(axis=1))


def test_more_ties_than_candidates() -> None:
    rows = unit_rows(1200)
    rows[np.random.default_rng(3).permutation(1200)[:300]] = rows[0]
    scores, ids, _ = search(rows, rows[:3], 11)
    assert_nearest(scores, ids, full(rows[:3], rows), 11)


def test_differences_below_the_rounding_of_float32() -> None:
    """300 near copies, less than 1e-6 apart: float32 orders some of them wrongly, and counts some of them wrongly."""
    rng = np.random.default_rng(3)
    rows, queries = unit_rows(600, dim=512), unit_rows(20, seed=9, dim=512)
    queries[:, :64] /= 64
    queries = (queries / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)).astype(np.float16)
    copies = rng.permutation(600)[:300]
    rows[copies] = queries[0]
    rows[copies, :64] = 2.0**-10 + rng.integers(0, 8, (300, 64)) * 2.0**-20
    everything = full(queries, rows)
    thresholds = everything[:, copies[:1]]
    scores, ids, nearer = search(rows, queries, 11, thresholds)
    assert_nearest(scores, ids, everything, 11)
    expected = (everything > thresholds).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(nearer, expected)
    rough = queries.astype(np.float32) @ rows.astype(np.float32).T
    assert ((rough > thresholds).sum(axis=1) != expected[:, 0]).any(), "the example must be one that float32 gets wrong"


def test_only_the_ranges_that_a_query_meets_count() -> None:
    rows, queries = unit_rows(100), unit_rows(3, seed=1)
    found = Scan(Rows(rows, np.arange(100) + 1000), queries, 2, np.zeros((3, 1), np.float32))
    found.compare(np.array([0, 2]), 10, 40)
    found.compare(np.array([2]), 60, 61)
    everything = full(queries, rows)
    scores, ids = found.nearest()
    assert found.scanned.tolist() == [30, 0, 31]
    assert ids[1].tolist() == [-1, -1]
    assert ids[0, 0] == 1010 + everything[0, 10:40].argmax()
    assert found.nearer[2, 0] == (everything[2, [*range(10, 40), 60]] > 0).sum()
    assert np.isneginf(scores[1]).all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    rows, queries = unit_rows(5000, dim=512), unit_rows(300, seed=1, dim=512)
    thresholds = full(queries, rows)[:, 7:9]
    answers = []
    for device in ("cpu", "cuda"):
        found = Scan(Rows(rows, device=device), queries, 11, thresholds)
        found.compare(np.arange(300), 0, 5000)
        answers.append((*found.nearest(), found.nearer))
    for on_cpu, on_gpu in zip(*answers, strict=True):
        np.testing.assert_array_equal(on_cpu, on_gpu)
