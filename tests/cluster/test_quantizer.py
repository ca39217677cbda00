"""The coarse quantiser against all similarities in float64."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.quantizer import Quantizer, cut, neighbours_first
from cluster.store import StoreError


def unit_rows(count: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def brute_force(queries: np.ndarray, centroids: np.ndarray, num_probes: int) -> np.ndarray:
    """The most similar cells by float64; of equally similar ones the lower numbers."""
    scores = (queries.astype(np.float64) @ centroids.astype(np.float64).T).astype(np.float32)
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :num_probes], axis=1)


@settings(deadline=None, max_examples=60)
@given(num_cells=st.integers(2, 90), num_probes=st.integers(1, 100), copies=st.integers(0, 60), seed=st.integers(0, 1000))
def test_the_most_similar_cells_are_found_ties_by_number(num_cells: int, num_probes: int, copies: int, seed: int) -> None:
    centroids = unit_rows(num_cells, seed=seed)
    centroids[num_cells // 2 : num_cells // 2 + copies] = centroids[0]  # more equally similar cells than there are candidates
    queries = np.concatenate([unit_rows(20, seed=seed + 1), centroids[:3]])
    found = Quantizer(centroids, np.zeros(num_cells, np.int32)).nearest(queries, num_probes)
    assert found.dtype == np.int32
    assert np.array_equal(found, brute_force(queries, centroids, min(num_probes, num_cells)))


def test_what_rounding_cannot_tell_is_told_apart() -> None:
    """Cells that differ by less than float32's error of the product: the order is that of float64."""
    centroids = np.repeat(unit_rows(1, 512), 40, axis=0)
    rng = np.random.default_rng(3)
    for row in centroids:  # one unit in the last place of a few small numbers
        chosen = np.argsort(np.abs(row))[rng.integers(0, 40, 3)]
        row[chosen] = np.nextafter(row[chosen], np.float16(1))
    queries = unit_rows(50, 512, seed=4)
    for num_probes in (1, 7, 39):
        found = Quantizer(centroids, np.zeros(40, np.int32)).nearest(queries, num_probes)
        assert np.array_equal(found, brute_force(queries, centroids, num_probes))


def test_no_queries() -> None:
    assert Quantizer(unit_rows(9), np.zeros(9, np.int32)).nearest(unit_rows(0), 3).shape == (0, 3)


def test_the_size_of_a_batch_changes_nothing() -> None:
    quantizer, queries = Quantizer(unit_rows(200), np.zeros(200, np.int32)), unit_rows(300, seed=1)
    alone = np.concatenate([quantizer.nearest(query[None], 9) for query in queries])
    assert np.array_equal(quantizer.nearest(queries, 9), alone)


def test_training_gives_unit_centers_and_balanced_parts() -> None:
    rng = np.random.default_rng(0)
    sample = unit_rows(40)[rng.integers(0, 40, 4000)].astype(np.float32) + 0.05 * rng.standard_normal((4000, 24)).astype(np.float32)
    sample /= np.linalg.norm(sample, axis=1, keepdims=True)
    found = Quantizer.train(sample, 32, 4)
    assert len(found) == 32
    assert set(found.part) == {0, 1, 2, 3}
    assert (np.diff(found.part) >= 0).all()
    assert np.linalg.norm(found.centroids.astype(np.float32), axis=1) == pytest.approx(np.ones(32), abs=2e-3)
    held = np.bincount(found.part[found.nearest(sample, 1)[:, 0]])
    assert held.max() < 2 * held.mean()
    mine = np.max(sample @ found.centroids.astype(np.float32).T, axis=1).mean()
    assert mine > np.max(sample @ unit_rows(32, seed=9).astype(np.float32).T, axis=1).mean() + 0.3, "centres lie where the images are"


def test_bytes_there_and_back() -> None:
    made = Quantizer(unit_rows(12), np.repeat(np.arange(3, dtype=np.int32), 4))
    read = Quantizer.from_bytes(made.to_bytes(), "here")
    assert np.array_equal(read.centroids, made.centroids)
    assert np.array_equal(read.part, made.part)


def test_pickled_it_is_small_and_the_same() -> None:
    made = Quantizer(unit_rows(300), np.zeros(300, np.int32))
    data = pickle.dumps(made)
    assert len(data) < made.centroids.nbytes + made.part.nbytes + 1000
    queries = unit_rows(20, seed=3)
    assert np.array_equal(pickle.loads(data).nearest(queries, 5), made.nearest(queries, 5))


@pytest.mark.parametrize("damage", ["cut", "nan", "descending", "float32"])
def test_what_is_no_quantiser_is_refused_by_name(damage: str) -> None:
    centroids, part = unit_rows(12), np.repeat(np.arange(3, dtype=np.int32), 4)
    if damage == "nan":
        centroids[3, 3] = np.nan
    data = Quantizer(centroids.astype(np.float32) if damage == "float32" else centroids, part[::-1] if damage == "descending" else part)
    content = data.to_bytes()
    with pytest.raises(StoreError, match=r"s3://b/q\.safetensors is no quantiser.*delete this index"):
        Quantizer.from_bytes(content[:-5] if damage == "cut" else content, "s3://b/q.safetensors")


@given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=60), num_parts=st.integers(1, 12))
def test_cut_gives_runs_without_gaps(weights: list[int], num_parts: int) -> None:
    runs = cut(np.array(weights), num_parts)
    assert runs[0] == 0
    assert set(np.diff(runs)) <= {0, 1}
    assert runs[-1] < num_parts
    held = np.bincount(runs, weights=weights)
    assert held.max() <= sum(weights) / num_parts + max(weights), "no run is heavier than its share and one cell"


def test_neighbours_in_space_are_neighbours_in_number() -> None:
    line = np.random.default_rng(0).permutation(64)
    order = neighbours_first(np.stack([line, np.zeros(64)], 1).astype(np.float64))
    assert sorted(order) == list(range(64))
    assert np.abs(np.diff(line[order])).mean() < 3, "64 numbers in random order are 21 apart"
