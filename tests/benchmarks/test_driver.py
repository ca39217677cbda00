"""The benchmark of the driver, in small: it counts what it says. What a shard costs: tests/cluster/test_scheduler.py."""

from __future__ import annotations

import pytest

from benchmarks import driver


def test_the_scheduler_over_simulated_workers() -> None:
    row = driver.simulated(400, 20)
    assert row["workers"] == 20
    assert row["CPU a shard, ms"] > 0
    assert 0 < row["shards a second"] < 2 * driver.RATE, "it is the workers that set the pace"


@pytest.mark.s3
def test_a_resume_that_finds_nothing_left_to_do(ray_session: None) -> None:
    found = driver.resume(30)
    assert set(found) == {f"{step}, {unit}" for step in ("writing", "listing", "reading", "resume") for unit in ("s", "CPU s")}
