"""The pace: that of the last minute, falling while nothing comes, in memory that does not grow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.pace import COMMITS, MARKS, WINDOW_SECONDS, Pace


def test_there_is_none_before_the_first_commit():
    assert Pace(0.0).rate(100.0) is None


@settings(deadline=None, max_examples=50)
@given(st.floats(0.001, 500), st.floats(0.1, 1e5), st.integers(2 * COMMITS, 400))
def test_a_steady_stream_has_its_rate(gap: float, amount: float, count: int):
    pace = Pace(0.0)
    for number in range(1, count + 1):
        pace.add(number * gap, amount)
    assert pace.rate(count * gap) == pytest.approx(amount / gap, rel=0.15)


def test_a_new_pace_is_taken_after_a_minute_and_the_old_one_forgotten():
    pace, now = Pace(0.0), 0.0
    for gap in [0.1] * 10_000 + [1.0] * 120:
        now += gap
        pace.add(now, 1)
    assert pace.rate(now) == pytest.approx(1.0, rel=0.1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 300), st.floats(0, 1e6)), min_size=1, max_size=300), st.floats(0.001, 1e4))
def test_it_is_never_negative_nor_above_all_that_came_and_falls_in_silence(steps: list[tuple[float, float]], silence: float):
    pace, now, total = Pace(0.0), 0.0, 0.0
    for gap, amount in steps:
        now, total = now + gap, total + amount
        pace.add(now, amount)
    first, later = pace.rate(now + silence), pace.rate(now + 2 * silence + WINDOW_SECONDS)
    assert first is not None
    assert later is not None
    assert 0 <= later <= first * (1 + 1e-9)
    assert first <= total / silence * (1 + 1e-9)


def test_memory_does_not_grow():
    pace = Pace(0.0)
    for number in range(100_000):
        pace.add(number * 0.01, 1)
    assert len(pace._marks) <= MARKS + COMMITS + 2
