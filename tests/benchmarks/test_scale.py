from __future__ import annotations

import pytest

from benchmarks.scale import exponents


def _size(images: int, build: float, search: float, largest: float) -> dict[str, object]:
    phases = {"build": {"seconds": build}, "search": {"seconds": search, "largest": largest}, "exact": {"seconds": images / 1e6}}
    return {"images": images, "queries": 1000, "sample": 100, "phases": phases}


def test_exponents_of_known_growth_are_found() -> None:
    found = exponents([_size(n, 3e-6 * n**1.5, 2e-3 * n**0.5, 500.0 * n) for n in (250_000, 1_000_000, 10_000_000)])
    assert found == pytest.approx({"build": 1.5, "search, a query": 0.5, "exact, a query": 1.0, "largest process": 1.0})


def test_one_size_shows_no_growth() -> None:
    assert exponents([_size(1000, 1, 1, 1)]) == {}
