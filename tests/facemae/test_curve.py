"""CMC curves, and guessing, against counting and exact combinatorics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.chance import chance_identity, chance_image
from facemae.curve import Curve, depths
from facemae.rank import UNDEFINED

DEPTHS = depths(1000)
rank_lists = st.lists(st.one_of(st.just(UNDEFINED), st.integers(1, 12), st.integers(1, 1000)), max_size=60)


@pytest.mark.parametrize(
    ("num_gallery", "beyond"),
    [(4, []), (10, []), (11, [11]), (20, [20]), (21, [20, 21]), (238, [20, 50, 100, 200, 238]), (1000, [20, 50, 100, 200, 500, 1000])],
)
def test_the_grid_of_depths(num_gallery: int, beyond: list[int]) -> None:
    assert depths(num_gallery).tolist() == [*range(1, 11), *beyond]


def test_the_grid_of_260_million_is_short() -> None:
    grid = depths(260_000_000)
    assert len(grid) == 33
    assert grid[-3:].tolist() == [100_000_000, 200_000_000, 260_000_000]
    assert (np.diff(grid) > 0).all()


@given(rank_lists, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_cmc_is_a_share_that_grows_and_ignores_order(values: list[int], random) -> None:
    identities = np.arange(len(values)) % 4
    order = random.sample(range(len(values)), len(values))
    found = np.array(values, np.int64)
    curve, shuffled = Curve.of(found, identities, 1000), Curve.of(found[order], identities[order], 1000)
    assert curve.queries == sum(value != UNDEFINED for value in values)
    assert ((curve.cmc >= 0) & (curve.cmc <= 1)).all()
    assert curve.queries == 0 or curve.cmc[-1] == 1, "the whole gallery holds every mate"
    assert curve.hits.tolist() == [sum(1 <= value <= k for value in values) for k in DEPTHS]
    assert curve.to_json(1000) == shuffled.to_json(1000)
    low, high = curve.interval
    for ends in (low, curve.cmc, high):
        assert (np.diff(ends) >= -1e-15).all()
    assert ((low <= curve.cmc) & (curve.cmc <= high) & (low >= 0) & (high <= 1)).all()
    assert 0 <= curve.effective_queries <= curve.queries


@pytest.mark.parametrize(("num_gallery", "mates"), [(50, [0, 1, 3, 3, 49]), (12, [11, 2]), (5, [4, 1]), (2, [1]), (1_000_000, [30, 1])])
def test_chance_of_an_identity_is_the_hypergeometric(num_gallery: int, mates: list[int]) -> None:
    grid = depths(num_gallery)
    counted = [m for m in mates if m]
    expected = []
    for k in grid.tolist():
        drawn = min(k, num_gallery - 1)
        if drawn > 20_000:  # the quotient of binomials is a product of m factors then too
            shares = [1 - math.prod(max(num_gallery - 1 - drawn - i, 0) / (num_gallery - 1 - i) for i in range(m)) for m in counted]
        else:
            shares = [1 - math.comb(num_gallery - 1 - m, drawn) / math.comb(num_gallery - 1, drawn) for m in counted]
        expected.append(sum(shares) / len(counted))
    np.testing.assert_allclose(chance_identity(num_gallery, np.bincount(mates), grid), expected, rtol=1e-9)


@pytest.mark.parametrize(("num_gallery", "mates"), [(1000, 3), (1000, 400), (1_000_000, 64), (260_000_000, 64)])
def test_chance_equals_drawing_one_by_one(num_gallery: int, mates: int) -> None:
    draws = np.arange(1000 if num_gallery > 1000 else num_gallery - 1 - mates)
    one_by_one = -np.expm1(np.cumsum(np.log1p(-mates / (num_gallery - 1 - draws))))
    found = chance_identity(num_gallery, np.bincount([mates]), draws + 1)
    np.testing.assert_allclose(found, one_by_one, rtol=1e-11)


def test_chance_extremes() -> None:
    np.testing.assert_allclose(chance_image(4, depths(4)), np.minimum(np.arange(1, 11) / 4, 1))
    assert chance_identity(260_000_000, np.bincount([64]), np.array([1]))[0] == pytest.approx(64 / 259_999_999, rel=1e-12)
    assert chance_identity(50, np.bincount([3]), np.array([46, 47, 50])).tolist() == pytest.approx([1 - 1 / math.comb(49, 3), 1, 1])
    assert not chance_identity(10, np.bincount([0, 0]), depths(10)).any()
    assert not chance_identity(10, np.zeros(0, np.int64), depths(10)).any()


def test_guessing_follows_the_chance_curve() -> None:
    rng, num_gallery, others = np.random.default_rng(0), 200, np.repeat([1, 4, 9], 4000)
    found = np.array([1 + rng.choice(num_gallery - 1, m, replace=False).min() for m in others])
    curve = Curve.of(found, np.arange(len(found)), num_gallery, others)
    chance = curve.chance(num_gallery)
    assert (np.abs(curve.cmc - chance) <= 4 * np.sqrt(chance * (1 - chance) / len(found))).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="found 1 to 11"):
        Curve.of(np.array([1, 11]), np.arange(2), 10)
    with pytest.raises(ValueError, match="found 0 to 3"):
        Curve.of(np.array([3, 0]), np.arange(2), 10)
    with pytest.raises(ValueError, match="no shard was searched"):
        Curve.merge([])
    with pytest.raises(ValueError, match=r"different sizes \(\[100, 200\]\)"):
        Curve.merge([Curve.of(np.array([1]), np.arange(1), size) for size in (100, 200)])
