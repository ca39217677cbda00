"""The head is lost with all it knew: the job is begun again on a new cluster as the next attempt, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.dataset import Dataset
from cluster.verify import verify
from tests.faults.nodes import nodes
from tests.nodes.conftest import UNITS
from tests.nodes.run import Run

pytestmark = [pytest.mark.nodes, pytest.mark.faults, pytest.mark.timeout(900)]


def test_the_head_is_restarted_and_the_job_goes_on_as_a_new_attempt(tmp_path: Path):
    with nodes([0, 2]) as first:
        run = Run(first, tmp_path).begin(units=UNITS, seconds=0.5)
        run.until(lambda: len(run.marks()) >= 10)
        driver = run.processes[-1]
        for node in reversed(first.nodes):
            node.kill()
        driver.kill()
        driver.wait()
    committed = len(Dataset(run.root).names())
    assert 0 < committed < UNITS
    with nodes([0, 2]) as second:
        again = Run(second, tmp_path).begin(units=UNITS, seconds=0.1)
        said = again.end()
        assert said["resumed"] >= committed
        assert said["failed"] == []
    assert verify(run.root).ok
    assert {manifest.attempt for manifest in Dataset(run.root).manifests()} == {1, 2}
    assert len({manifest.run for manifest in Dataset(run.root).manifests()}) == 1
    assert len(run.marks()) - UNITS <= 4, "only what was in hand is computed again"
