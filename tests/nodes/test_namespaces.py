"""Each node with a network of its own, as on real machines: nothing leans on a shared loopback, and a cut cable is a lost node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.dataset import Dataset
from cluster.verify import verify
from tests.nodes.conftest import UNITS
from tests.nodes.namespaces import namespaces
from tests.nodes.run import Run

pytestmark = [pytest.mark.nodes, pytest.mark.faults, pytest.mark.timeout(900)]


def test_a_node_whose_cable_is_pulled_is_lost_and_its_work_done_elsewhere(tmp_path: Path, note: Callable[[str], None]):
    with namespaces([0, 1, 1]) as cluster:
        run = Run(cluster, tmp_path).begin(units=UNITS, seconds=1.0)
        cut = cluster.nodes[-1]
        run.until(lambda: len(run.by_node()) == 2)
        cluster.cut(cut)
        said = run.end()
        assert said["failed"] == []
        assert "failed (1 of" not in run.log(), run.log()
        assert "with its node" in run.log()
    assert verify(run.root).ok
    assert len(Dataset(run.root).names()) == UNITS
    note(f"{said['seconds']:.1f} s; {len(run.marks()) - UNITS} of {UNITS} units computed twice")
