"""Who is asked for which cells, against a plain count of (query, cell) pairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.routing import Route, by_cell, request_bytes, route


@st.composite
def probes_and_owners(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """int32 (Q, P), distinct ascending cells of each query, as a quantiser gives them; int32 (C,), the owner of each cell."""
    num_cells = draw(st.integers(1, 40))
    num_queries, num_probes = draw(st.integers(0, 12)), draw(st.integers(1, num_cells))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    probes = np.array([np.sort(rng.permutation(num_cells)[:num_probes]) for _ in range(num_queries)], np.int32)
    return probes.reshape(num_queries, num_probes), rng.integers(0, draw(st.integers(1, 8)), num_cells).astype(np.int32)


@given(probes_and_owners())
def test_every_probed_cell_is_asked_of_its_owner_once(given: tuple[np.ndarray, np.ndarray]) -> None:
    probes, owners = given
    routes = list(route(probes, owners))
    asked = Counter(
        (r.owner, int(query), cell) for r in routes for query, row in zip(r.queries, r.cells.tolist(), strict=True) for cell in row
    )
    pairs = Counter((int(owners[cell]), query, cell) for query, row in enumerate(probes.tolist()) for cell in row)
    assert Counter({pair: count for pair, count in asked.items() if pair[2] >= 0}) == pairs
    assert len({r.owner for r in routes}) == len(routes), "an owner is asked once"


@given(probes_and_owners())
def test_a_route_is_packed(given: tuple[np.ndarray, np.ndarray]) -> None:
    """Nobody is asked for nothing: no row of nothing, no column of nothing, and -1 only behind the cells."""
    for r in route(*given):
        held = r.cells >= 0
        assert (r.queries.dtype, r.cells.dtype) == (np.int64, np.int32)
        assert r.cells.shape[0] == len(r.queries)
        assert (np.diff(r.queries) > 0).all()
        assert held.any(axis=1).all()
        assert held.any(axis=0).all()
        assert not (held[:, 1:] & ~held[:, :-1]).any()


@given(probes_and_owners())
def test_by_cell_is_the_inverse(given: tuple[np.ndarray, np.ndarray]) -> None:
    for cells in [r.cells for r in route(*given)] + [np.full((3, 2), -1, np.int32)]:
        found = list(by_cell(cells))
        numbers = [cell for cell, _ in found]
        assert numbers == sorted(set(numbers))
        assert all((np.diff(rows) > 0).all() for _, rows in found)
        pairs = {(cell, int(row)) for cell, rows in found for row in rows}
        assert pairs == {(cell, row) for row, mine in enumerate(cells.tolist()) for cell in mine if cell >= 0}


@given(probes_and_owners(), st.integers(1, 600), st.integers(0, 4), st.integers(0, 20), st.sampled_from([np.float16, np.float32]))
def test_the_bytes_of_a_search_are_those_of_its_arrays(
    given: tuple[np.ndarray, np.ndarray], dim: int, num_thresholds: int, k: int, dtype: type[np.floating]
) -> None:
    routes, total = list(route(*given)), 0
    for r in routes:
        rows = len(r.queries)
        there = np.zeros((rows, dim), dtype).nbytes + r.cells.nbytes + np.zeros((rows, num_thresholds), np.float32).nbytes
        back = np.zeros((rows, k), np.float32).nbytes + np.zeros((rows, k), np.int64).nbytes
        total += there + back + np.zeros((rows, num_thresholds), np.int64).nbytes + np.zeros(rows, np.int64).nbytes
    assert request_bytes(routes, dim, num_thresholds, k, np.dtype(dtype).itemsize) == total


def test_a_route_by_hand() -> None:
    probes, owners = np.array([[0, 2, 3], [1, 2, 4], [0, 1, 4]], np.int32), np.array([0, 0, 1, 1, 2], np.int32)
    first, second, third = route(probes, owners)
    assert (first.owner, first.queries.tolist(), first.cells.tolist()) == (0, [0, 1, 2], [[0, -1], [1, -1], [0, 1]])
    assert (second.owner, second.queries.tolist(), second.cells.tolist()) == (1, [0, 1], [[2, 3], [2, -1]])
    assert (third.owner, third.queries.tolist(), third.cells.tolist()) == (2, [1, 2], [[4], [4]])
    assert [(cell, rows.tolist()) for cell, rows in by_cell(first.cells)] == [(0, [0, 2]), (1, [1, 2])]
    assert request_bytes([third], 4, 1, 2) == 2 * (4 * 2 + 4 + 4) + 2 * (2 * (4 + 8) + 8 + 8)
    assert request_bytes(list[Route](), 4, 1, 2) == 0
