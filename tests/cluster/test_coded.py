"""Codes propose, embeddings decide: against all similarities of the rows in the probed cells, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.coded import CANDIDATES, CodedRows, train_codes
from cluster.quantizer import Quantizer

DIM, NUM_CELLS = 32, 8
EMPTY = 5
"""A cell without rows."""


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


SAMPLE = unit_rows(2000)
QUANTIZER = Quantizer.train(SAMPLE, NUM_CELLS, 2)
_CELLS = QUANTIZER.nearest(SAMPLE, 1)[:, 0]
ROWS, CELLS = SAMPLE[_CELLS != EMPTY], _CELLS[_CELLS != EMPTY]
IDS = np.random.default_rng(1).permutation(10 * len(ROWS))[: len(ROWS)]
SCORES = (unit_rows(60, seed=2).astype(np.float64) @ ROWS.astype(np.float64).T).astype(np.float32)
QUERIES = unit_rows(60, seed=2)
THRESHOLDS = np.stack([np.sort(SCORES, axis=1)[:, -4], np.zeros(60, np.float32), np.full(60, np.nan, np.float32)], 1)


@pytest.fixture(scope="module", params=["PQ8", "PQ16x4", "SQ8"])
def coded(request: pytest.FixtureRequest) -> CodedRows:
    factory = f"IVF{NUM_CELLS},{request.param}"
    return CodedRows(train_codes(factory, QUANTIZER, SAMPLE), ROWS, IDS, CELLS)


def probes(*cells: int) -> np.ndarray:
    return np.tile(np.array(cells, np.int32), (len(QUERIES), 1))


def seen(*cells: int) -> np.ndarray:
    """Similarities (Q, N), -inf where a row lies in another cell."""
    return np.where(np.isin(CELLS, cells), SCORES, np.float32(-np.inf))


@pytest.mark.parametrize("cells", [(0, 1, 2, 3, 4, 5, 6, 7), (3, -1, 6), (EMPTY, 2)])
def test_similarities_are_exact_and_counts_never_too_high(coded: CodedRows, cells: tuple[int, ...]) -> None:
    scores, ids, nearer, scanned = coded.search(QUERIES, probes(*cells), 7, THRESHOLDS)
    rows_of = {int(number): row for row, number in enumerate(IDS)}
    expected = seen(*cells)
    for query in range(len(QUERIES)):
        np.testing.assert_array_equal(scores[query], expected[query, [rows_of[number] for number in ids[query].tolist()]])
        assert len(set(ids[query].tolist())) == 7
    assert (np.diff(scores, axis=1) <= 0).all()
    exact = (expected[:, :, None] > THRESHOLDS[:, None, :]).sum(axis=1)
    assert (nearer <= exact).all()
    assert (nearer[:, 1] < exact[:, 1]).any() or exact[:, 1].max() <= CANDIDATES, "half of all rows are nearer than 0: not all proposed"
    assert (nearer[:, 0] == exact[:, 0]).mean() > 0.9, "of the few nearest, codes of this size miss hardly any"
    assert (nearer[:, 2] == 0).all(), "NaN counts nothing"
    assert (scanned == np.isin(CELLS, cells).sum()).all()


def test_where_every_row_is_proposed_the_answer_is_that_of_brute_force(coded: CodedRows) -> None:
    scores, ids, nearer, _ = coded.search(QUERIES, probes(1, 4), len(ROWS), THRESHOLDS)
    expected = seen(1, 4)
    order = np.lexsort((np.broadcast_to(IDS, expected.shape), -expected))
    held = int(np.isin(CELLS, (1, 4)).sum())
    np.testing.assert_array_equal(ids[:, :held], IDS[order][:, :held])
    np.testing.assert_array_equal(scores[:, :held], np.take_along_axis(expected, order, 1)[:, :held])
    assert (ids[:, held:] == -1).all()
    assert np.isneginf(scores[:, held:]).all()
    np.testing.assert_array_equal(nearer, (expected[:, :, None] > THRESHOLDS[:, None, :]).sum(axis=1))


@pytest.mark.parametrize("cells", [(EMPTY,), (-1, -1)])
def test_nothing_is_found_where_nothing_is(coded: CodedRows, cells: tuple[int, ...]) -> None:
    scores, ids, nearer, scanned = coded.search(QUERIES, probes(*cells), 3, THRESHOLDS)
    assert np.isneginf(scores).all()
    assert (ids == -1).all()
    assert not nearer.any()
    assert not scanned.any()


def test_an_actor_without_rows() -> None:
    empty = CodedRows(train_codes(f"IVF{NUM_CELLS},SQ8", QUANTIZER, SAMPLE), ROWS[:0], IDS[:0], CELLS[:0])
    _, ids, nearer, scanned = empty.search(QUERIES, probes(0, 1), 3, THRESHOLDS)
    assert ids.shape == (60, 3)
    assert (ids == -1).all()
    assert not nearer.any()
    assert not scanned.any()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "IVF8,PQ7",
            r"FAISS makes no index of 'IVF8,PQ7' for embeddings of 32 numbers \(.*\): e\.g\. IVF1024,PQ4",
        ),  # 32 is no multiple of 7
        ("IVF8,XYZ", r"FAISS makes no index of 'IVF8,XYZ' for embeddings of 32 numbers \(.*\): e\.g\. IVF1024,PQ4"),
        ("HNSW32", r"'HNSW32' is no plain IVF index \(it is a IndexHNSWFlat\): e\.g\. IVF1024,PQ4"),
        ("OPQ8,IVF8,PQ8", r"'OPQ8,IVF8,PQ8' is no plain IVF index \(it is a IndexPreTransform\)"),
    ],
)
def test_what_faiss_does_not_make_is_said_by_name(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_codes(factory, QUANTIZER, SAMPLE)
