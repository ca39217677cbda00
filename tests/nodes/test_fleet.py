"""Nodes that come, go, drain and dawdle under a running stage: every unit is done, none is charged, the bytes are the same."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from cluster.dataset import Dataset
from tests.nodes.conftest import UNITS
from tests.nodes.run import Run, drain

pytestmark = [pytest.mark.nodes, pytest.mark.faults, pytest.mark.timeout(900)]
Digests = dict[str, str | None]
Note = Callable[[str], None]


def test_the_work_is_placed_on_all_nodes_and_the_head_is_spared(run: Run, undisturbed: Digests, note: Note):
    said = run.begin(units=UNITS, seconds=0.5).end()
    head, *workers = (node.ip for node in run.cluster.nodes)
    assert set(run.by_node()) == set(workers)
    assert run.by_node()[head] == 0
    run.require(UNITS, undisturbed)
    note(f"{UNITS} units of 0.5 s, {len(workers)} nodes x 2 workers: {said['seconds']:.1f} s; each node {sorted(run.by_node().values())}")


def test_a_node_is_lost_in_mid_job(run: Run, undisturbed: Digests, note: Note):
    lost = run.cluster.nodes[-1]
    run.begin(units=UNITS, seconds=0.5)
    run.until(lambda: run.by_node()[lost.ip] >= 2)
    run.cluster.kill(lost)
    said = run.end()
    run.require(UNITS, undisturbed)
    assert "with its node" in run.log()
    again = len(run.marks()) - UNITS
    assert again <= 4, "at most what was in the hands of its two workers"
    note(f"{said['seconds']:.1f} s; {again} units computed twice")


def test_a_node_is_drained_in_mid_job(run: Run, undisturbed: Digests, note: Note):
    """Nothing is lost, not even work: what a worker has begun it finishes, and what it has not begun goes elsewhere."""
    leaving = run.cluster.nodes[-1]
    run.begin(units=UNITS, seconds=1.0)
    run.until(lambda: run.by_node()[leaving.ip] >= 2)
    started = time.monotonic()
    done = drain(run.cluster, "--address", run.cluster.address, "--node", leaving.ip, "--grace", "120")
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.processes[-1].poll() is None, "the others still work"
    count = run.by_node()[leaving.ip]
    run.end()
    assert run.by_node()[leaving.ip] == count, "it got nothing new"
    run.require(UNITS, undisturbed)
    assert "is being drained" in run.log()
    assert "was lost" not in run.log()
    assert len(run.marks()) == UNITS, "each was computed once"
    assert leaving.ip not in drain(run.cluster, "--address", run.cluster.address, "--list").stdout, "it does not come back"
    run.cluster.kill(leaving)  # what is left of `ray start`
    note(f"drained and gone {seconds:.1f} s after it was asked, units of 1 s; none computed twice")


def test_what_cannot_be_drained_is_left_alone(run: Run):
    address = ["--address", run.cluster.address]
    before = drain(run.cluster, *address, "--list").stdout
    assert before.count("alive") == len(run.cluster.nodes)
    for wrong, said in (
        (["--node", "zzz"], "no living node"),
        (["--node", run.cluster.ip], "is the head"),
        ([], f"{len(run.cluster.nodes)} nodes run on this machine"),
        (["--grace", "-1", "--node", run.cluster.nodes[1].ip], "give 0 or more"),
    ):
        refused = drain(run.cluster, *address, *wrong)
        assert refused.returncode == 2
        assert said in refused.stderr
    assert drain(run.cluster, *address, "--list").stdout == before


@pytest.mark.parametrize("workers", [0, 6])
def test_a_node_is_added_in_mid_job(run: Run, undisturbed: Digests, note: Note, workers: int):
    """Also where nobody said how many workers: as many as fit, and more fit now."""
    run.begin(units=UNITS, seconds=1.5, workers=workers)
    run.until(lambda: len(run.marks()) >= 4)
    started = time.monotonic()
    added = run.cluster.add(2)
    joined = time.monotonic()
    run.until(lambda: run.by_node()[added.ip] >= 1)
    working = time.monotonic()
    run.end()
    run.require(UNITS, undisturbed)
    run.cluster.kill(added)
    note(f"joined after {joined - started:.1f} s, its first unit (1.5 s) done {working - joined:.1f} s later")


def test_a_slow_node_does_what_it_can(run: Run, undisturbed: Digests, note: Note):
    """One node takes five times as long: the fast one does most of the work, and the end does not wait for the slow one."""
    slow, fast = run.cluster.nodes[1].ip, run.cluster.nodes[2].ip
    said = run.begin(units=UNITS, seconds=0.5, slow=slow, factor=5).end()
    run.require(UNITS, undisturbed)
    assert run.by_node()[fast] > run.by_node()[slow] > 0
    note(f"{said['seconds']:.1f} s; the fast node computed {run.by_node()[fast]}, the slow one {run.by_node()[slow]} of {UNITS} units")


def test_a_job_that_waits_for_its_first_worker_is_stopped_at_once(run: Run, note: Note):
    """It asks for workers that no node can hold."""
    run.begin(units=UNITS, cpus=64, workers=1)
    run.until(lambda: (run.folder / "out" / "attempts").is_dir())
    time.sleep(3.0)
    started = time.monotonic()
    run.processes[-1].send_signal(signal.SIGTERM)
    run.end(143)
    assert "40 shards are left" in run.log()
    assert Dataset(run.root).names() == []
    note(f"ended {time.monotonic() - started:.1f} s after SIGTERM")
