"""The most exposed images."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.exposure import Exposure

images = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0.1, 0.5, 0.5000001, 0.9])), max_size=60)


def exposure(rows: list[tuple[int, float]], part: np.ndarray) -> Exposure:
    ranks, similarities = (np.array([rows[row][item] for row in part]) for item in (0, 1))
    return Exposure.of([f"k{row:02d}" for row in part], -(part // 3), ranks, similarities)


@given(images, st.lists(st.integers(0, 60), max_size=3))
@settings(max_examples=60, deadline=None)
def test_the_top_of_a_sort(rows: list[tuple[int, float]], cuts: list[int]) -> None:
    everybody = np.arange(len(rows))
    expected = sorted((-score, f"k{row:02d}", -(row // 3)) for row, (rank, score) in enumerate(rows) if rank == 1)[:20]
    whole = exposure(rows, everybody)
    assert [(-row.similarity, row.key, row.identity) for row in whole.rows] == expected
    parts = np.split(everybody[::-1], np.minimum(sorted(cuts), len(rows)))
    assert Exposure.merge(exposure(rows, part) for part in parts) == whole
    assert [row["key"] for row in whole.to_json()] == [key for _, key, _ in expected]


def test_an_image_without_a_mate_is_not_exposed() -> None:
    assert Exposure.of(["a", "b"], np.array([1, 2]), np.array([-1, 7]), np.array([np.nan, 0.9])).to_json() == []
