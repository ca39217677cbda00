"""Histograms, and the true accept rate against the ROC of the raw similarities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.linking import NUM_BINS, add_histograms, histogram, linking


def exact_tar(mates: np.ndarray, impostors: np.ndarray, rate: float) -> float:
    """The highest point of the ROC at that false accept rate or below, a threshold at each similarity in turn."""
    thresholds = np.unique(np.concatenate([mates, impostors, [np.inf]]))
    false = 1 - np.searchsorted(np.sort(impostors), thresholds) / len(impostors)
    true = 1 - np.searchsorted(np.sort(mates), thresholds) / len(mates)
    return float(true[false <= rate * (1 + 1e-9)].max())


def similarities(seed: int, count: int, shift: float, spread: float) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(shift, spread, count), -1, 1).astype(np.float32)


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4, 0.8])
def test_never_below_the_roc_and_within_a_bin(shift: float) -> None:
    mates, impostors = similarities(0, 3000, shift, 0.1), similarities(1, 100_000, 0.0, 0.08)
    rows = linking(histogram(mates), histogram(impostors))
    assert [row["far"] for row in rows] == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    for row in rows[:4]:
        exact = exact_tar(mates, impostors, row["far"])
        edge = row["threshold"]
        in_bin = np.mean((mates >= edge - 1e-6) & (mates <= edge + 2 / NUM_BINS + 1e-6))
        assert exact <= row["tar"] <= exact + in_bin + 1e-12
        assert row["tar"] == pytest.approx(np.mean(mates >= edge), abs=1e-3)
    for row in rows[4:]:
        assert row["tar"] is None
        assert row["threshold"] is None
        assert "100000 impostor pairs" in row["reason"]


scores = st.lists(st.integers(-40, 40).map(lambda step: step / 40), min_size=1, max_size=40)


@given(scores, st.lists(st.integers(-40, 40).map(lambda step: step / 40), min_size=100, max_size=130))
@settings(max_examples=60, deadline=None)
def test_ties_count_for_the_attacker(mates: list[float], impostors: list[float]) -> None:
    """Similarities of a few values only, so that mates and impostors are equal ones: still never below the ROC."""
    first = linking(histogram(np.array(mates)), histogram(np.array(impostors)))[0]
    assert first["tar"] >= exact_tar(np.array(mates), np.array(impostors), 0.1) - 1e-12


def test_the_threshold_is_the_first_impostor_to_refuse() -> None:
    impostors = np.zeros(NUM_BINS, np.int64)
    impostors[990 - 10 * np.arange(100)] = 1  # of a hundred, ten may pass: the eleventh lies in bin 890
    first = linking(np.ones(NUM_BINS, np.int64), impostors)[0]
    assert first == {"far": 0.1, "tar": 0.11, "threshold": pytest.approx(-1 + 890 * 0.002)}


def test_equal_similarities_accept_all() -> None:
    same = histogram(np.full(5000, 0.3))
    assert [row["tar"] for row in linking(same, same)[:2]] == [1.0, 1.0]


def test_too_little_to_tell() -> None:
    few, many = histogram(np.zeros(99)), histogram(np.zeros(100))
    assert linking(many, few)[0]["reason"] == "99 impostor pairs, 100 are needed"
    assert linking(many, many)[0]["tar"] == 1.0
    assert linking(np.zeros(NUM_BINS, np.int64), many)[0] == {"far": 0.1, "tar": None, "threshold": None, "reason": "no pair of mates"}


def test_histograms_keep_every_value() -> None:
    values = np.array([-1.0000001, -1, -0.999, 0, 0.0019, 0.0021, 1, 1.0000001, 0.5], np.float32)
    counts = histogram(values)
    assert (len(counts), counts.sum(), counts.dtype) == (1000, len(values), np.int64)
    assert (counts[0], counts[500], counts[501], counts[750], counts[999]) == (3, 2, 1, 1, 2)
    total = add_histograms([{"mate": counts}, {"mate": counts, "impostor": counts}])
    assert (total["mate"].sum(), total["impostor"].sum()) == (18, 9)
