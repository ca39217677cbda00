"""Intervals against textbook values, coverage by simulation, and the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.interval import clopper_pearson_high, clustered, effective_queries, wilson

Sizes = Callable[[np.random.Generator, int], np.ndarray]
SIZES: dict[str, Sizes] = {
    "five": lambda rng, count: np.full(count, 5),
    "mixed": lambda rng, count: np.minimum(rng.geometric(0.1, count), 60),
    "heavy tail": lambda rng, count: np.minimum(1 + (4 * rng.pareto(1.5, count)).astype(np.int64), 300),
}


def test_wilson_textbook_values() -> None:
    low, high = wilson(np.array([0, 5, 10, 81]), np.array([10, 10, 10, 263]))
    np.testing.assert_allclose(low, [0, 0.2366, 0.7225, 0.2553], atol=5e-5)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1, 0.3662], atol=5e-5)  # the last pair: Newcombe 1998, table I
    assert [float(end[0]) for end in wilson(np.array([0]), 0)] == [0, 1]


def test_wilson_covers_the_truth() -> None:
    hits = np.random.default_rng(0).binomial(400, 0.03, 4000)
    low, high = wilson(hits, 400)
    assert 0.93 < np.mean((low <= 0.03) & (high >= 0.03)) < 0.975


def people(seed: int, count: int, sizes: Sizes, share: float, correlation: float) -> tuple[np.ndarray, np.ndarray]:
    """Images of each identity and those traced, beta-binomial."""
    rng = np.random.default_rng(seed)
    images, weight = sizes(rng, count), (1 - correlation) / max(correlation, 1e-9)
    shares = rng.beta(share * weight, (1 - share) * weight, count) if correlation else np.full(count, share)
    return images, rng.binomial(images, shares)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("correlation", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_clustered_interval_covers_the_truth(share: float, correlation: float, sizes: str) -> None:
    """In 93 % of 400 draws and more, also where a few people have most of the images and are traced as one."""
    inside = above = 0
    for seed in range(400):
        images, hits = people(seed, 400, SIZES[sizes], share, correlation)
        low, high = clustered(hits.sum(), images.sum(), effective_queries(images, hits))
        inside += int(low <= share <= high)
        above += int(share <= high)
    assert inside >= 0.93 * 400
    assert above >= 0.95 * 400, "the end that a gate uses is one of 97.5 %"


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_independent_queries_would_say_too_much(share: float) -> None:
    """What the clustering is for: Wilson's interval of all images misses the truth far too often."""
    draws = [people(seed, 400, SIZES["heavy tail"], share, 0.5) for seed in range(200)]
    ends = [wilson(hits.sum(), images.sum()) for images, hits in draws]
    assert np.mean([low <= share <= high for low, high in ends]) < 0.5


@pytest.mark.parametrize(("share", "correlation"), [(0.05, 0.1), (0.2, 0.0), (0.2, 0.5), (0.5, 0.2)])
@pytest.mark.parametrize("sizes", ["five", "mixed"])
def test_its_width_is_that_of_a_bootstrap_over_identities(share: float, correlation: float, sizes: str) -> None:
    images, hits = people(1, 2000, SIZES[sizes], share, correlation)
    low, high = clustered(hits.sum(), images.sum(), effective_queries(images, hits))
    drawn = np.random.default_rng(0).integers(0, len(images), (1000, len(images)))
    ends = np.quantile(hits[drawn].sum(axis=1) / images[drawn].sum(axis=1), [0.025, 0.975])
    assert high - low == pytest.approx(ends[1] - ends[0], rel=0.12)
    assert (low, high) == pytest.approx(tuple(ends), rel=0.03)


def test_alike_images_of_a_person_count_once() -> None:
    once = np.repeat([True, False], [40, 160])
    images, hits = np.full(200, 7), 7 * once
    assert effective_queries(images, hits) == pytest.approx(200, rel=1e-9)
    assert effective_queries(np.ones(200, np.int64), once) == pytest.approx(200, rel=1e-9), "single images are independent"


@pytest.mark.parametrize("traced", [False, True])
def test_no_hit_and_nothing_but_hits_count_identities(traced: bool) -> None:
    images = np.array([5, 5, 5, 5])
    assert effective_queries(images, images * traced) == pytest.approx(4)
    mixed = np.array([1, 1, 2, 100])
    effective = effective_queries(mixed, mixed * traced)
    assert effective == pytest.approx(104**2 / (1 + 1 + 4 + 10_000))
    low, high = clustered(np.array(104 * traced), 104, effective)
    assert (low == 0, high == 1) == (not traced, traced)
    assert high - low > 0.7, "one person of a hundred images, and three others, say next to nothing"


def test_the_largest_design_effect_counts() -> None:
    images = np.full(300, 4)
    alike, apart = np.repeat([4, 0], [30, 270]), np.random.default_rng(0).binomial(4, 0.1, 300)
    assert effective_queries(images, np.stack([apart, alike, apart], axis=1)) == pytest.approx(effective_queries(images, alike))
    assert effective_queries(images, alike) < 0.5 * effective_queries(images, apart)


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_interval_holds_the_share(rows: list[tuple[int, float]]) -> None:
    images = np.array([size for size, _ in rows], np.int64)
    hits = np.array([round(size * share) for size, share in rows], np.int64)
    num, effective = int(images.sum()), effective_queries(images, hits)
    assert 0 <= effective <= num
    low, high = clustered(np.array(hits.sum()), num, effective)
    assert 0 <= low <= hits.sum() / max(num, 1) <= high <= 1


def binomial_tail(hits: int, queries: int, share: float) -> float:
    return math.fsum(math.comb(queries, i) * share**i * (1 - share) ** (queries - i) for i in range(hits + 1))


@pytest.mark.parametrize(("hits", "queries"), [(0, 10), (1, 10), (3, 10), (9, 10), (0, 1000), (17, 400), (200, 400)])
def test_clopper_pearson_is_where_the_tail_has_two_and_a_half_percent(hits: int, queries: int) -> None:
    assert binomial_tail(hits, queries, clopper_pearson_high(hits, queries)) == pytest.approx(0.025, rel=1e-6)


def test_clopper_pearson_textbook_values() -> None:
    assert clopper_pearson_high(81, 263) == pytest.approx(0.3676, abs=5e-5)  # Newcombe 1998, table I
    assert clopper_pearson_high(0, 20) == pytest.approx(1 - 0.025 ** (1 / 20), rel=1e-12)
    assert (clopper_pearson_high(10, 10), clopper_pearson_high(0, 0)) == (1.0, 1.0)
    assert clopper_pearson_high(30_000, 100_000) == pytest.approx(0.3 + 1.96 * math.sqrt(0.21 / 1e5), abs=2e-5)
    with pytest.raises(ValueError, match="11 hits of 10"):
        clopper_pearson_high(11, 10)
