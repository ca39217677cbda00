"""Leakage statistics against brute force, textbook values and exact combinatorics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.leakage import (
    BEYOND,
    DEPTH,
    UNDEFINED,
    Curve,
    Leakage,
    Risk,
    chance_identity,
    chance_image,
    histogram,
    ranks,
    similarity,
    wilson,
)

rank_lists = st.lists(st.integers(UNDEFINED, DEPTH), max_size=60)


def unit_rows(count: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def test_similarity_does_not_depend_on_the_order_of_summation() -> None:
    left, right = unit_rows(200, 512), unit_rows(200, 512, seed=1)
    shuffled = np.random.default_rng(2).permutation(512)
    expected = [np.float32(math.fsum(float(a) * float(b) for a, b in zip(x, y, strict=True))) for x, y in zip(left, right, strict=True)]
    np.testing.assert_array_equal(similarity(left, right), expected)
    np.testing.assert_array_equal(similarity(left[:, shuffled], right[:, shuffled]), expected)
    np.testing.assert_array_equal(similarity(left[:3, None], right[None])[2], similarity(left[2:3], right))


def test_ranks_equal_a_sort_of_the_full_matrix() -> None:
    queries, gallery = unit_rows(80, 8), unit_rows(300, 8, seed=1)
    scores = queries.astype(np.float32) @ gallery.astype(np.float32).T
    mates = np.random.default_rng(3).integers(0, 300, 80)
    place = np.argsort(np.argsort(-scores, axis=1), axis=1)[np.arange(80), mates] + 1
    top = -np.sort(-scores, axis=1)[:, :DEPTH]
    np.testing.assert_array_equal(ranks(top, scores[np.arange(80), mates]), np.where(place <= DEPTH, place, BEYOND))
    np.testing.assert_array_equal(ranks(scores, scores[np.arange(80), mates], depth=300), place)


def test_a_tie_counts_for_the_attacker() -> None:
    scores = np.array([[0.9, 0.9, 0.9, 0.5], [0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]], np.float32)
    np.testing.assert_array_equal(ranks(scores, np.array([0.9, 0.7, np.nan], np.float32), depth=3), [1, 3, UNDEFINED])
    np.testing.assert_array_equal(ranks(scores, np.array([0.5, 0.6, -np.inf], np.float32), depth=3), [BEYOND, BEYOND, BEYOND])


@given(rank_lists, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_cmc_is_a_share_that_grows_and_ignores_order(values: list[int], random) -> None:
    identities = np.arange(len(values)) % 4
    order = random.sample(range(len(values)), len(values))
    found = np.array(values, np.int32)
    curve, shuffled = Curve.of(found, identities), Curve.of(found[order], identities[order])
    assert curve.queries == sum(value != UNDEFINED for value in values)
    assert ((curve.cmc >= 0) & (curve.cmc <= 1)).all()
    assert (np.diff(curve.cmc) >= 0).all()
    for k in range(1, DEPTH + 1):
        assert curve.hits[k - 1] == sum(1 <= value <= k for value in values)
    assert curve.to_json(1000) == shuffled.to_json(1000)
    low, high = wilson(curve.hits, curve.queries)
    assert ((low <= curve.cmc) & (curve.cmc <= high) & (low >= 0) & (high <= 1)).all() or curve.queries == 0


@given(rank_lists, st.lists(st.integers(0, 60), max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_parts_add_up_to_the_whole(values: list[int], cuts: list[int], data: st.DataObject) -> None:
    found = np.array(values, np.int32)
    identities = np.array(data.draw(st.lists(st.integers(-3, 5), min_size=len(values), max_size=len(values))), np.int64)
    others = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values))), np.int64)
    scores = np.linspace(-1, 1, len(values))

    def measure(part: np.ndarray) -> Leakage:
        image, identity = Curve.of(found[part], identities[part]), Curve.of(found[part], identities[part], others[part])
        return Leakage(image, identity, {"mate": histogram(scores[part])})

    parts = np.split(np.arange(len(values)), np.minimum(sorted(cuts), len(values)))
    assert Leakage.merge([measure(part) for part in parts]).to_json(50) == measure(np.arange(len(values))).to_json(50)


def test_wilson_textbook_values() -> None:
    low, high = wilson(np.array([0, 5, 10, 81]), np.array([10, 10, 10, 263]))
    np.testing.assert_allclose(low, [0, 0.2366, 0.7225, 0.2553], atol=5e-5)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1, 0.3662], atol=5e-5)  # the last pair: Newcombe 1998, table I
    assert [float(end[0]) for end in wilson(np.array([0]), 0)] == [0, 1]


def test_wilson_covers_the_truth() -> None:
    hits = np.random.default_rng(0).binomial(400, 0.03, 4000)
    low, high = wilson(hits, 400)
    assert 0.93 < np.mean((low <= 0.03) & (high >= 0.03)) < 0.975


@pytest.mark.parametrize(("num_gallery", "mates"), [(50, [0, 1, 3, 3, 49]), (12, [11, 2]), (5, [4, 1]), (2, [1]), (1_000_000, [30, 1])])
def test_chance_of_an_identity_is_the_hypergeometric(num_gallery: int, mates: list[int]) -> None:
    expected = np.zeros(DEPTH)
    counted = [m for m in mates if m]
    for k in range(1, DEPTH + 1):
        drawn = min(k, num_gallery - 1)
        shares = [1 - math.comb(num_gallery - 1 - m, drawn) / math.comb(num_gallery - 1, drawn) for m in counted]
        expected[k - 1] = sum(shares) / len(counted)
    np.testing.assert_allclose(chance_identity(num_gallery, np.bincount(mates)), expected, rtol=1e-9)


def test_chance_extremes() -> None:
    np.testing.assert_allclose(chance_image(4), np.minimum(np.arange(1, 11) / 4, 1))
    assert chance_identity(260_000_000, np.bincount([64]))[0] == pytest.approx(64 / 259_999_999, rel=1e-9)
    assert not chance_identity(10, np.bincount([0, 0])).any()
    assert not chance_identity(10, np.zeros(0, np.int64)).any()


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.4, 1.0])
def test_a_planted_leak_rate_is_recovered(rate: float) -> None:
    rng = np.random.default_rng(7)
    gallery, num = unit_rows(2000, 64, seed=4), 2000
    traced = rng.permutation(num) < rate * num
    queries = np.where(traced[:, None], gallery, unit_rows(num, 64, seed=5))
    scores = queries.astype(np.float32) @ gallery.astype(np.float32).T
    found = ranks(-np.sort(-scores, axis=1)[:, :DEPTH], np.diagonal(scores))
    curve = Curve.of(found, np.arange(num) // 10)
    by_luck = int(((found == 1) & ~traced).sum())
    assert curve.hits[0] == traced.sum() + by_luck
    assert by_luck < 8  # chance is 1 in 2000 queries
    assert curve.risk.traced.sum() == curve.hits[0]


def test_risk_by_identity() -> None:
    identities = np.array([7] * 20 + [3] + [5] * 4 + [9] * 2)
    traced = np.array([True] * 19 + [False] + [True] + [False] * 4 + [True, False])
    content = Risk.of(identities, traced).to_json()
    assert content["worst"][0] == {"identity": 7, "images": 20, "traced": 19, "share": 0.95}  # before the 1 of 1 of identity 3
    assert [row["identity"] for row in content["worst"]] == [7, 3, 9]
    assert (content["identities"], content["traced_once"], content["traced_always"]) == (4, 3, 1)
    assert content["mean_share"] == pytest.approx((0.95 + 1 + 0 + 0.5) / 4)
    assert content["share_quantiles"] == {"0.5": 0.5, "0.75": 0.95, "0.9": 1.0, "0.95": 1.0, "0.99": 1.0, "1": 1.0}


def test_histograms_keep_every_value() -> None:
    values = np.array([-1.0000001, -1, -0.995, 0, 0.00999, 0.01, 1, 1.0000001, 0.5], np.float32)
    counts = histogram(values)
    assert counts.sum() == len(values)
    assert (counts[0], counts[100], counts[101], counts[150], counts[199]) == (3, 2, 1, 1, 2)


def test_content_is_strict_json_and_empty_curves_are_null() -> None:
    none, some = Curve.of(np.array([UNDEFINED] * 3), np.arange(3)), Curve.of(np.array([1, 0, 4]), np.arange(3), np.array([1, 2, 3]))
    content = Leakage(none, some, {"genuine": histogram(np.zeros(2))}).to_json(10)
    assert content["image"] is None
    assert content["identity"]["cmc"][:4] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3])
    assert len(content["histograms"]["genuine"]) == 200
    json.dumps(content, allow_nan=False)


def test_errors() -> None:
    with pytest.raises(ValueError, match="found 1 to 11"):
        Curve.of(np.array([1, 11]), np.arange(2))
    with pytest.raises(ValueError, match="no shard was searched"):
        Curve.merge([])
