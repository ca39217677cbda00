"""The promise under faults: whatever dies or fails, every image is in one committed shard or in the ledger, with the same bytes.

Each case runs the real job as its own process on a real Ray cluster against a real S3 server, does its worst, and ends with the same
check (tests/faults/check.py): every key and the sha256 of every member as in an undisturbed run, no stray object, sums that add up.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time

import pytest

from tests.faults.killer import WORKERS, Kill, Killer
from tests.faults.policy import FLAKY, FirstOf, KillAt, Kind, Random
from tests.faults.report import Case
from tests.faults.servers import Server
from tests.faults.world import SHARDS, World

pytestmark = [pytest.mark.faults, pytest.mark.s3, pytest.mark.timeout(900)]

IN_FLIGHT = 3
"""Shards in a worker's hands at once: all that its death can cost."""


def redone(world: World, root: str) -> int:
    """Data shards written more often than needed: the work that was done again."""
    return world.puts(root) - SHARDS


@pytest.mark.parametrize("job", ["ingest", "protect"])
@pytest.mark.parametrize("phase", ["get", "put", "before", "after"])
def test_workers_killed_at_any_byte(either: World, kills: int, fault_case: Case, phase: str, job: str, request: pytest.FixtureRequest):
    """kill -9 in the middle of a GET, of a PUT, between data and manifest, and between a commit and the news of it."""
    if (job, phase) not in {("protect", "put"), ("ingest", "before")}:
        request.getfixturevalue("long")
    undisturbed, root = either.undisturbed(job), either.new_root()
    fault_case.seed = either.proxy.seed
    keys = "tests/tars/" if (phase, job) == ("get", "ingest") else None
    with either.faults(KillAt(phase, 0.5, keys=keys, per_key_limit=2, limit=kills)) as happened:
        either.must(job, either.arguments(job, root), timeout=600)
    fault_case.injected(happened)
    assert 1 <= len(happened) <= kills  # of two requests of one process one kills it; how many there are hangs on the timing
    fault_case.figures["shards done again"] = redone(either, root)
    assert redone(either, root) <= IN_FLIGHT * kills + IN_FLIGHT
    fault_case.check(root, undisturbed)


def test_a_store_that_fails_one_request_in_ten(either: World, fault_case: Case):
    """500, 503 SlowDown, resets, short and slow bodies, answers that are lost after the deed."""
    undisturbed, root = either.undisturbed("protect"), either.new_root()
    fault_case.seed = either.proxy.seed
    with either.faults(Random(0.10, FLAKY, seconds=1.0)) as happened:
        either.must("protect", either.protect(root), timeout=600)
    fault_case.injected(happened)
    assert len(happened) >= SHARDS / 4
    fault_case.check(root, undisturbed)


def test_a_network_that_flips_bits(either: World, long: None, fault_case: Case):
    """One bit of one object in ten, on its way up or down: refused by the server, or found by its digest and sent again."""
    undisturbed, root = either.undisturbed("protect"), either.new_root()
    fault_case.seed = either.proxy.seed
    with either.faults(Random(0.10, (Kind.FLIP,), methods=("GET", "PUT"), keys=r"/(shards|manifests|quarantine)/")) as happened:
        either.must("protect", either.protect(root), timeout=600)
    fault_case.injected(happened)
    assert happened
    fault_case.check(root, undisturbed)


def test_kills_and_failures_together(here: World, kills: int, long: None, fault_case: Case):
    undisturbed, root = here.undisturbed("ingest"), here.new_root()
    fault_case.seed = here.proxy.seed
    killing = [KillAt(phase, 0.2, per_key_limit=2, limit=kills // 3 + 1) for phase in ("put", "before", "after")]
    with here.faults(FirstOf(*killing, Random(0.05, FLAKY, seconds=1.0))) as happened:
        here.must("ingest", here.ingest(root), timeout=600)
    fault_case.injected(happened)
    assert sum(each.pid is not None for each in happened) >= kills // 2
    fault_case.check(root, undisturbed)


def test_a_killer_at_large(here: World, kills: int, long: None, fault_case: Case):
    """A random worker dies every 2.5 s, whatever it does; not faster than workers start, since three that die starting end a run."""
    undisturbed, root = here.undisturbed("protect"), here.new_root()
    fault_case.seed = 5
    killer = Killer(2.5, WORKERS, str(here.cluster.folder), seed=5, limit=kills)
    with here.faults(Random(1.0, (Kind.SLOW,), keys=f"{root.removeprefix('s3://')}/shards/", seconds=4.0)):  # so that it lasts
        process = here.cluster.run_job("protect", here.protect(root))
        here.await_manifests(root, 1, process)
        killer.start()
        here.await_end(process, 0, timeout=600)
    victims: list[Kill] = killer.stop()
    fault_case.killed(victims, "worker")
    assert len(victims) >= min(kills, 5)
    fault_case.check(root, undisturbed)


def test_a_node_is_lost(here: World, kills: int, fault_case: Case, request: pytest.FixtureRequest):
    """kill -9 of a whole raylet with its workers; in the long run, one after another, with a new node for each."""
    request.getfixturevalue("long")
    undisturbed, root = here.undisturbed("protect"), here.new_root()
    with here.faults(Random(1.0, (Kind.SLOW,), keys=f"{root.removeprefix('s3://')}/shards/", seconds=2.0)):
        process = here.cluster.run_job("protect", here.protect(root))
        for number in range(2):
            here.await_manifests(root, 5 + 10 * number, process)
            for _ in here.cluster.kill(here.cluster.nodes[1]):
                fault_case.note("kill process of a node", killed=True)
            fault_case.note("node lost")
            here.cluster.add(1)
        here.await_end(process, 0, timeout=600)
    fault_case.check(root, undisturbed)


def test_the_driver_is_killed_and_started_again(either: World, kills: int, fault_case: Case):
    """At a random moment, again and again; each time another number of workers goes on."""
    undisturbed, root = either.undisturbed("protect"), either.new_root()
    rng = random.Random(7)
    fault_case.seed = 7
    rounds = 1 if kills < 10 else 4
    with either.faults(Random(1.0, (Kind.SLOW,), keys=f"{root.removeprefix('s3://')}/shards/", seconds=0.5)):  # so that it lasts
        for number in range(rounds):
            process = either.cluster.run_job("protect", either.protect(root, "--num-workers", str(1 + number % 2)))
            either.await_manifests(root, either.manifests(root) + rng.randint(1, SHARDS // (2 * rounds)), process)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            process.wait()
            fault_case.note("kill driver", killed=True)
    committed = either.manifests(root)
    assert 0 < committed < SHARDS
    process = either.must("protect", either.protect(root, "--num-workers", "2"))
    told = re.search(r"resumed: (\d+) shards were committed before, (\d+) in this run", either.cluster.log_of(process))
    assert told is not None
    resumed, done = map(int, told.groups())
    # a worker outlives its killed driver for a moment, in which a PUT that was under way may still commit its shard
    assert resumed >= committed
    assert resumed + done == SHARDS
    fault_case.figures["shards done again"] = redone(either, root)
    assert redone(either, root) <= 2 * IN_FLIGHT * (rounds + 1)
    fault_case.check(root, undisturbed)


def test_two_attempts_at_once(either: World, fault_case: Case):
    """Two complete jobs on one output: each shard is committed by one of them, and both end well."""
    undisturbed, root = either.undisturbed("protect"), either.new_root()
    slow = Random(1.0, (Kind.SLOW,), keys=f"{root.removeprefix('s3://')}/shards/", seconds=0.3)
    with either.faults(slow):  # so that they overlap
        both = [either.cluster.run_job("protect", either.protect(root, "--num-workers", "1")) for _ in range(2)]
        for process in both:
            either.await_end(process, 0)
    fault_case.note("second attempt")
    attempts = _attempts(either, root)
    assert len(attempts) == 2, "both must have committed something"
    fault_case.figures["shards done again"] = redone(either, root)
    assert redone(either, root) <= SHARDS // 2, "they meet in the middle"
    fault_case.check(root, undisturbed)


def test_sigterm_with_a_grace_period(here: World, long: None, fault_case: Case):
    """SIGTERM, and SIGKILL after the grace that a cluster gives: at most the shard in hand of each worker is lost."""
    undisturbed, root = here.undisturbed("protect"), here.new_root()
    with here.faults(Random(1.0, (Kind.SLOW,), keys=f"{root.removeprefix('s3://')}/shards/", seconds=2.0)):
        process = here.cluster.run_job("protect", here.protect(root))
        here.await_manifests(root, 4, process)
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    fault_case.note("SIGTERM")
    assert status == 143, here.cluster.log_of(process)[-3000:]
    committed = here.manifests(root)
    here.must("protect", here.protect(root))
    fault_case.figures |= {"committed at the end of the grace": committed, "shards done again": redone(here, root)}
    assert redone(here, root) <= 2
    fault_case.check(root, undisturbed)


def test_the_server_is_killed_and_restarted(here: World, broken_server: Server, long: None, fault_case: Case):
    undisturbed, root = here.undisturbed("protect"), here.new_root()
    with here.faults(Random(1.0, (Kind.SLOW,), keys=f"{root.removeprefix('s3://')}/shards/", seconds=0.5)):
        process = here.cluster.run_job("protect", here.protect(root))
        for number in range(3):
            here.await_manifests(root, 3 + 8 * number, process)
            broken_server.kill()
            fault_case.note("kill S3 server", killed=True)
            time.sleep(3)
            broken_server.restart()
        here.await_end(process, 0, timeout=400)
    fault_case.check(root, undisturbed)


def test_the_server_stands_still_for_thirty_seconds(here: World, broken_server: Server, long: None, fault_case: Case):
    undisturbed, root = here.undisturbed("protect"), here.new_root()
    process = here.cluster.run_job("protect", here.protect(root))
    here.await_manifests(root, 3, process)
    broken_server.hold()
    fault_case.note("SIGSTOP of the S3 server for 30 s")
    time.sleep(30)
    broken_server.release()
    here.await_end(process, 0, timeout=400)
    fault_case.check(root, undisturbed)


def _attempts(world: World, root: str) -> set[int]:
    """Which attempts committed shards."""
    from cluster.dataset import Dataset

    return {manifest.attempt for manifest in Dataset(root).manifests()}
