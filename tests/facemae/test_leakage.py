"""The sum of one search's statistics, and the similarity it rests on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.curve import Curve
from facemae.exposure import Exposure
from facemae.leakage import Leakage, similarity
from facemae.linking import histogram
from facemae.rank import UNDEFINED, ranks
from facemae.recall import NOT_SAMPLED, Sample, Tightness

GALLERY = 60


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
    mate = scores[np.arange(80), mates]
    place = np.argsort(np.argsort(-scores, axis=1), axis=1)[np.arange(80), mates] + 1
    found = ranks(np.sum(scores > mate[:, None], axis=1), mate)
    np.testing.assert_array_equal(found, place)
    assert found.dtype == np.int64


def test_a_tie_counts_for_the_attacker() -> None:
    scores = np.array([[0.9, 0.9, 0.9, 0.5], [0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]], np.float32)
    mate = np.array([0.9, 0.7, np.nan], np.float32)
    np.testing.assert_array_equal(ranks(np.sum(scores > mate[:, None], axis=1), mate), [1, 3, UNDEFINED])


def search(seed: int, count: int) -> dict[str, np.ndarray]:
    """The rows that a search of ``count`` queries may give, a third of them searched exactly too."""
    rng = np.random.default_rng(seed)
    exact, other = rng.integers(1, GALLERY + 1, (2, count))
    exact[rng.random(count) < 0.3] = 1
    other[rng.random(count) < 0.2] = UNDEFINED
    sampled = rng.random(count) < 0.3
    top = rng.uniform(-1, 1, count).astype(np.float32)
    return {
        "identities": rng.integers(-3, 5, count),
        "image": np.maximum(1, exact - rng.integers(0, 3, count)),
        "identity": other,
        "exact_image": np.where(sampled, exact, NOT_SAMPLED),
        "exact_identity": np.where(sampled, other, NOT_SAMPLED),
        "others": rng.integers(1, 9, count),
        "mate": np.round(rng.uniform(-1, 1, count), 1).astype(np.float32),
        "top": top,
        "exact_top": np.where(sampled, np.maximum(top, rng.uniform(-1, 1, count)), np.nan).astype(np.float32),
    }


def measure(rows: dict[str, np.ndarray], part: np.ndarray) -> Leakage:
    rows = {name: column[part] for name, column in rows.items()}
    labels = rows["identities"]
    image, identity = Curve.of(rows["image"], labels, GALLERY), Curve.of(rows["identity"], labels, GALLERY, rows["others"])
    exact = Tightness.of(rows["image"], rows["exact_image"]), Tightness.of(rows["identity"], rows["exact_identity"])
    return Leakage(
        image,
        identity,
        {"mate": histogram(rows["mate"]), "impostor": histogram(rows["top"])},
        Exposure.of([f"k{row:03d}" for row in part], labels, rows["image"], rows["mate"]),
        Sample.of(*exact, rows["top"], rows["exact_top"]),
    )


@given(st.integers(0, 10_000), st.integers(0, 90), st.lists(st.integers(0, 90), max_size=4))
@settings(max_examples=60, deadline=None)
def test_parts_add_up_to_the_whole(seed: int, count: int, cuts: list[int]) -> None:
    rows = search(seed, count)
    parts = np.split(np.arange(count), np.minimum(sorted(cuts), count))
    whole = measure(rows, np.arange(count))
    merged = Leakage.merge([measure(rows, part) for part in parts])
    assert merged.to_json(GALLERY) == whole.to_json(GALLERY)
    assert merged.exposure == whole.exposure
    assert merged.sample == whole.sample


def test_content_is_strict_json_and_empty_parts_are_null() -> None:
    none = Curve.of(np.array([UNDEFINED] * 3), np.arange(3), 10)
    some = Curve.of(np.array([1, 9, 4]), np.arange(3), 10, np.array([1, 2, 3]))
    content = Leakage(none, some, {"genuine": histogram(np.zeros(2))}).to_json(10)
    assert (content["image"], content["linking"], content["sample"], content["most_exposed"]) == (None, None, None, [])
    assert content["identity"]["cmc"][:4] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3])
    assert content["identity"]["depths"] == list(range(1, 11))
    assert len(content["histograms"]["genuine"]) == 1000
    json.dumps(content, allow_nan=False)
    json.dumps(measure(search(0, 90), np.arange(90)).to_json(GALLERY), allow_nan=False)


def test_no_parts_are_an_error() -> None:
    with pytest.raises(ValueError, match="no shard was searched"):
        Leakage.merge([])
