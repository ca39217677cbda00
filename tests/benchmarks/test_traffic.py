from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.traffic import Message, broadcast_bytes, routed_bytes


def _counted(cells: np.ndarray, owners: np.ndarray, message: Message) -> list[int]:
    """Every message made as arrays, and their bytes added up."""
    totals = []
    for probes in cells:
        total = 0
        for shard in set(owners[probes].tolist()):
            mine = np.array([cell for cell in probes if owners[cell] == shard], np.int32)
            sent = [np.int32(0), np.zeros(message.dim, np.float16), np.zeros(message.thresholds, np.float32), mine]
            answer = [np.zeros(message.k, np.float32), np.zeros(message.k, np.int64), np.zeros(message.thresholds, np.int64), np.int64(0)]
            total += sum(part.nbytes for part in (*sent, *answer))
        totals.append(total)
    return totals


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(1, 8), st.integers(1, 9), st.integers(0, 3))
def test_routed_bytes_equal_a_count_of_every_message(seed: int, num_cells: int, num_shards: int, num_queries: int, thresholds: int) -> None:
    rng = np.random.default_rng(seed)
    num_probes = int(rng.integers(1, num_cells + 1))
    cells = np.stack([rng.permutation(num_cells)[:num_probes] for _ in range(num_queries)])
    owners, message = rng.integers(0, num_shards, num_cells), Message(dim=int(rng.integers(1, 600)), k=3, thresholds=thresholds)
    assert routed_bytes(cells, owners, message).tolist() == _counted(cells, owners, message)


def test_broadcast_is_routing_to_all_without_probe_lists() -> None:
    cells, message = np.arange(6)[None], Message(dim=64)
    assert broadcast_bytes(6, message) == routed_bytes(cells, np.arange(6), message)[0] - 4 * 6
