"""A cluster of several nodes on this machine, and a killer that hurts nobody else's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.faults.check import Snapshot, compare
from tests.faults.killer import WORKERS, Killer, killer_actor, raylet_of
from tests.faults.nodes import Cluster, nodes

pytestmark = pytest.mark.faults

PROBE = """
import sys, time, ray
ray.init(address=sys.argv[1])
alive = lambda: sum(node["Alive"] for node in ray.nodes())
print("alive:", alive(), int(ray.cluster_resources()["CPU"]), flush=True)
deadline = time.monotonic() + 30
while alive() == int(sys.argv[2]) and time.monotonic() < deadline:
    time.sleep(0.1)
print("alive:", alive(), flush=True)
"""


@pytest.fixture(scope="module")
def cluster(pytestconfig: pytest.Config) -> Iterator[Cluster]:
    if not pytestconfig.getoption("--kills"):
        pytest.skip("runs in `make faults`")
    with nodes([0, 1, 1]) as running:
        yield running
    assert not [process for process in psutil.process_iter(["cmdline"]) if running.folder.name in " ".join(process.info["cmdline"] or [])]
    assert not running.folder.exists()


def test_a_job_runs_on_the_nodes_and_outlives_one_of_them(cluster: Cluster, tmp_path: Path):
    job = cluster.run_job("ingest", ["--source", "synthetic:ids=40,images=20", "--output", str(tmp_path / "out"), "--shard-size", "10"])
    while job.poll() is None and not list(tmp_path.glob("out/manifests/*")):
        time.sleep(0.05)
    assert cluster.kill(cluster.nodes[2])
    assert job.wait(100) == 0, cluster.log_of(job)
    assert compare(str(tmp_path / "out"), Snapshot({}, {})).samples == 800
    with pytest.raises(ValueError, match="head"):
        cluster.kill(cluster.nodes[0])


def test_a_killed_raylet_is_a_lost_node(cluster: Cluster):
    node = cluster.add(1)
    others = len(cluster.nodes)
    watcher = [sys.executable, "-c", PROBE, cluster.address, str(others)]
    with subprocess.Popen(watcher, env=cluster.environment, stdout=subprocess.PIPE, text=True) as probe:
        assert said(probe) == f"alive: {others} {others - 1}\n"  # the head lends no CPU
        killer = Killer(0.1, raylet_of(node.ip), within=str(cluster.folder), limit=1)
        killer.start()
        assert said(probe) == f"alive: {others - 1}\n"
        (kill,) = killer.stop()
    assert "raylet" in kill.title
    cluster.kill(node)


def said(probe: subprocess.Popen[str]) -> str:
    """The next line of its own; Ray prints between them."""
    assert probe.stdout is not None
    return next(line for line in probe.stdout if line.startswith("alive:"))


class Worker:
    def pid(self) -> int:
        return psutil.Process().pid


@pytest.mark.s3
def test_the_killer_kills_workers_of_its_own_session_alone(long: None, ray_session: None):
    stranger = subprocess.Popen(["ray::Worker", "60"], executable="/bin/sleep")
    actor: Any = ray.remote(Worker)
    workers = [actor.options(num_cpus=0.1).remote() for _ in range(3)]
    pids = ray.get([worker.pid.remote() for worker in workers])
    killer = killer_actor(0.3, WORKERS, seed=1, limit=2)
    started = time.time()
    ray.get(killer.start.remote())
    while len(ray.get(killer.report.remote())) < 2 and time.time() < started + 20:
        time.sleep(0.1)
    time.sleep(0.6)  # the limit holds
    kills = ray.get(killer.stop.remote())
    ray.kill(killer)
    assert len(kills) == 2
    assert {kill.pid for kill in kills} < set(pids)
    assert all(kill.title.startswith("ray::Worker") and kill.time > started for kill in kills)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    (left,) = set(pids) - {kill.pid for kill in kills}
    assert ray.get(workers[pids.index(left)].pid.remote()) == left
    for worker in workers:
        ray.kill(worker)


def test_a_killer_keeps_its_beat_and_can_be_told_pids(long: None):
    victims = [subprocess.Popen(["sleep", "60"]) for _ in range(4)]
    killer = Killer(0.2, [victim.pid for victim in victims[:3]], within="", jitter=0)
    started = time.time()
    killer.start()
    for victim in victims[:3]:
        victim.wait(20)
    kills = killer.stop()
    assert {kill.pid for kill in kills} == {victim.pid for victim in victims[:3]}
    assert all(0.19 * i < kill.time - started for i, kill in enumerate(kills, 1))
    assert victims[3].poll() is None
    victims[3].kill()
    victims[3].wait()
