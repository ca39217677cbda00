"""The exact sample against a search that overlooks items on purpose, and its bounds against the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.curve import Curve
from facemae.interval import clopper_pearson_high
from facemae.rank import UNDEFINED
from facemae.recall import NOT_SAMPLED, Sample, Tightness

pairs = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30), st.sampled_from([True, True, False])), max_size=50)


def overlooking(seed: int, count: int, seen: float, sample: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True ranks, ranks by a search that sees each nearer item with chance ``seen``, and the sample's exact ranks."""
    rng = np.random.default_rng(seed)
    true = np.where(rng.random(count) < 0.05, 1, 1 + rng.geometric(0.2, count))
    found = 1 + rng.binomial(true - 1, seen)
    return true, found, np.where(rng.random(count) < sample, true, NOT_SAMPLED)


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_counts(rows: list[tuple[int, int, bool]]) -> None:
    found = np.array([rank for rank, _, _ in rows], np.int64)
    exact = np.array([rank + more if sampled else NOT_SAMPLED for rank, more, sampled in rows], np.int64)
    tight = Tightness.of(found, exact)
    sampled = [(rank, rank + more) for rank, more, kept in rows if kept]
    assert tight.queries == len(sampled)
    assert tight.hits == sum(rank == 1 for rank, _ in sampled)
    assert tight.exact_hits == sum(true == 1 for _, true in sampled) <= tight.hits
    ratios = [(rank - 1) / (true - 1) for rank, true in sampled if true > 1]
    if sampled:
        content = tight.to_json(Curve.of(found, np.arange(len(found)), 60))
        assert content is not None
        assert content["nearer_found"] == (pytest.approx(np.mean(ratios), abs=1e-11) if ratios else None)
        assert content["false_hits_high"] == clopper_pearson_high(tight.hits - tight.exact_hits, tight.queries)
        assert 0 <= content["bounds"]["low"] <= content["bounds"]["high"] <= 1


def test_an_exact_search_costs_its_bounds_only_the_samples_size() -> None:
    true, _, exact = overlooking(0, 20_000, 1.0, 0.5)
    curve, tight = Curve.of(true, np.arange(20_000) // 4, 300), Tightness.of(true, exact)
    low, high = (float(end[0]) for end in curve.interval)
    assert tight.hits == tight.exact_hits
    assert tight.bounds(curve) == (pytest.approx(low - clopper_pearson_high(0, tight.queries)), high)
    assert tight.bounds(curve)[0] == pytest.approx(low, abs=5e-4)


@pytest.mark.parametrize("seen", [0.5, 0.9, 0.99])
def test_the_bounds_hold_the_truth(seen: float) -> None:
    """The planted CMC@1 is 0.05; the search overlooks items, so that its own share is above."""
    inside, above = 0, []
    for seed in range(100):
        true, found, exact = overlooking(seed, 2000, seen, 0.2)
        curve, tight = Curve.of(found, np.arange(2000) // 4, 300), Tightness.of(found, exact)
        assert curve.cmc[0] >= np.mean(true == 1), "an approximate search can only overstate"
        low, high = tight.bounds(curve)
        inside += int(low <= 0.05 <= high)
        above.append(curve.cmc[0] - 0.05)
    assert inside >= 93
    assert np.mean(above) > (0.05 if seen == 0.5 else 0)


def test_recall_is_the_share_whose_nearest_was_found() -> None:
    top = np.array([0.5, 0.7, 0.2, 0.9], np.float32)
    exact_top = np.array([0.5, 0.8, np.nan, 0.9], np.float32)
    sample = Sample.of(Tightness(), Tightness(), top, exact_top)
    assert (sample.queries, sample.found) == (3, 2)
    curve = Curve.of(np.array([1]), np.array([1]), 10)
    content = Sample.merge([sample, sample]).to_json(curve, curve)
    assert content is not None
    assert (content["queries"], content["found"], content["recall_at_1"]) == (6, 4, pytest.approx(2 / 3))
    assert (content["image"], content["identity"]) == (None, None)
    assert Sample().to_json(curve, curve) is None


def test_queries_without_a_mate_or_outside_the_sample_do_not_count() -> None:
    tight = Tightness.of(np.array([UNDEFINED, 1, 3]), np.array([UNDEFINED, NOT_SAMPLED, 5]))
    assert (tight.queries, tight.hits, tight.behind) == (1, 0, 1)


def test_what_no_search_can_say_is_an_error() -> None:
    with pytest.raises(ValueError, match="rank 4 of a search whose exact rank is 3"):
        Tightness.of(np.array([1, 4]), np.array([2, 3]))
    with pytest.raises(ValueError, match="rank -1 of a search whose exact rank is 3"):
        Tightness.of(np.array([UNDEFINED]), np.array([3]))
    with pytest.raises(ValueError, match="more similar item than the exact one"):
        Sample.of(Tightness(), Tightness(), np.array([0.9]), np.array([0.8]))
