from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.traffic import broadcast_bytes, routed_bytes
from jobs.plan import NEIGHBOURS, THRESHOLDS


def _counted(cells: np.ndarray, owners: np.ndarray, dim: int) -> int:
    """Every array of every message made, and their bytes added up. One request of an owner is a rectangle: as wide as its longest list."""
    total = 0
    for owner in set(owners.tolist()):
        lists = [[cell for cell in probes if owners[cell] == owner] for probes in cells.tolist()]
        lists = [mine for mine in lists if mine]
        widest = max(map(len, lists), default=0)
        for mine in lists:
            cells_sent = np.array(mine + [-1] * (widest - len(mine)), np.int32)
            sent = (np.zeros(dim, np.float16), np.zeros(THRESHOLDS, np.float32), cells_sent)
            answer = (
                np.zeros(NEIGHBOURS, np.float32),
                np.zeros(NEIGHBOURS, np.int64),
                np.zeros(THRESHOLDS, np.int64),
                np.zeros(1, np.int64),
            )
            total += sum(int(part.nbytes) for part in sent) + sum(int(part.nbytes) for part in answer)
    return total


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(1, 8), st.integers(1, 9))
def test_routed_bytes_equal_a_count_of_every_message(seed: int, num_cells: int, num_shards: int, num_queries: int) -> None:
    rng = np.random.default_rng(seed)
    num_probes, dim = int(rng.integers(1, num_cells + 1)), int(rng.integers(1, 600))
    cells = np.stack([rng.permutation(num_cells)[:num_probes] for _ in range(num_queries)]).astype(np.int32)
    owners = rng.integers(0, num_shards, num_cells)
    assert round(routed_bytes(cells, owners, dim) * num_queries) == _counted(cells, owners, dim)


def test_broadcast_is_routing_to_all_without_lists_of_cells() -> None:
    cells = np.arange(6)[None]
    assert broadcast_bytes(6, dim=64) == _counted(cells, np.arange(6), 64) - 4 * 6
