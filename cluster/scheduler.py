"""The driver's half of a stage: which worker gets which unit, and what happens when one fails, dies, is slow or must leave.

Near the end, when no unit waits for a worker, one that has been in a worker's hands for much longer than usual is handed to an idle
worker too. The first commit wins; what the slow one still does comes to nothing.

What a unit costs here does not grow with the number of workers (benchmarks/driver.py): answers come by a queue, and who holds what is
looked up (cluster/hands.py), never searched.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from cluster.attempt import Attempt
from cluster.crew import Answer, Crew, Lost
from cluster.dataset import Manifest
from cluster.hands import Given, Hands
from cluster.processor import Unit
from cluster.watcher import Reason, Watcher
from cluster.worker import Opened, Outcome

log = logging.getLogger(__name__)

STORAGE_PATIENCE = 600.0
"""Seconds without a single commit, on a store that keeps failing, before a stage gives up."""

STRAGGLER_FACTOR = 2.0
STRAGGLER_SECONDS = 2.0
"""A unit is handed out again when it has been in hand this many times as long as the median, and at least so long."""

START_FAILURES = 3
"""Workers that die in a row while they start and none is ready, before a stage gives up. One that dies with its node does not count."""

TICK_SECONDS = 0.5
"""Between two looks at whether to stop, who is slow, who must leave."""

GiveUp = Callable[[Unit, Sequence[str]], Manifest]
"""Quarantines a unit whole, given the errors of its tries."""


class StageError(RuntimeError):
    """The stage cannot go on; the message says why and what to do."""


class Interrupted(RuntimeError):
    """The stage was asked to stop (SIGTERM, SIGINT) and has drained. Everything committed stays; run it again to go on."""


class Scheduler:
    """Hands units to workers until all are committed or given up.

    Args:
        crew: the workers.
        units: what to do, in the order in which to begin it.
        give_up: called for a unit that failed ``max_failures`` times.
        attempt: whose commits are this run's own, for the watcher.
        in_flight: units a worker holds at once.
        watcher: told of what happens.

    Attributes:
        stop: when set, the work in hand is finished and ``run`` ends.
        ready_at: ``time.perf_counter()`` when the first worker was ready.
    """

    def __init__(
        self,
        crew: Crew,
        units: Sequence[Unit],
        give_up: GiveUp,
        *,
        attempt: Attempt,
        in_flight: int,
        max_failures: int,
        watcher: Watcher | None = None,
    ) -> None:
        self._crew, self._give_up, self._attempt = crew, give_up, attempt
        self._max_failures, self._watcher = max_failures, watcher or Watcher()
        self._pending, self._suspects = deque(units), deque[Unit]()
        self._failures: dict[str, list[str]] = {}
        self._hands, self._durations = Hands(in_flight), deque[float](maxlen=99)
        self._done = set[str]()
        self._leaving: object = frozenset[str]()
        self._told = (-1, -1)
        self._start_failures = 0
        self._pause, self._paused_until, self._last_commit = 1.0, 0.0, time.monotonic()
        self.stop = threading.Event()
        self.ready_at: float | None = None

    def run(self, num_workers: int = 0) -> Iterator[Manifest]:
        """Yield manifests as they are committed.

        Args:
            num_workers: 0 for as many as fit the cluster, also when it grows.

        Raises:
            StageError: a fatal error.
            Interrupted: ``stop`` was set, and the work in hand is done.
        """
        draining = False
        try:
            while len(self._hands) or (self._left() and not self.stop.is_set()):
                if self.stop.is_set() and not draining:
                    draining = True
                    for worker in self._hands.workers():
                        self._crew.drain(worker)
                self._clear_nodes()
                self._hire(num_workers)
                self._dispatch()
                for answer in self._crew.answers(TICK_SECONDS):
                    manifest = self._settle(answer)
                    if manifest is not None:
                        yield manifest
            if self._left():
                raise Interrupted(
                    f"stopped as asked: all work in hand was committed, {self._left()} shards are left; run the same command again"
                )
        finally:
            self._crew.close()

    def _left(self) -> int:
        return len(self._pending) + len(self._suspects)

    def _hire(self, num_workers: int) -> None:
        """Start workers for the work that is left, also in place of dead and leaving ones."""
        wanted = min(num_workers or self._crew.room(), self._left() + self._hands.num_busy)
        for _ in range(0 if self.stop.is_set() else wanted - self._hands.num_staying):
            self._hands.add(self._crew.hire())
        if self._told != (self._hands.num_ready, wanted):
            self._told = (self._hands.num_ready, wanted)
            self._watcher.workers(*self._told)

    def _clear_nodes(self) -> None:
        """The workers of a node that is being drained finish what they compute, give the rest back and go."""
        leaving = self._crew.leaving()
        if leaving is self._leaving:
            return
        self._leaving = leaving
        for node in leaving:
            self._clear(node)

    def _clear(self, node: str) -> None:
        workers = self._hands.on_node(node)
        if workers:
            log.warning("node %s is being drained: its %d workers finish what they have begun", node[:12], len(workers))
        for worker in workers:
            self._hands.leave(worker)
            self._crew.drain(worker)
            self._dismiss_if_empty(worker)

    def _dismiss_if_empty(self, worker: int) -> None:
        if worker in self._hands and self._hands.is_leaving(worker) and not self._hands.load(worker):
            self._hands.remove(worker)
            self._crew.dismiss(worker)

    def _dispatch(self) -> None:
        """One unit to each worker in turn, so that few units spread over all; a suspect gets a worker of its own."""
        now = time.monotonic()
        if self.stop.is_set() or now < self._paused_until:
            return
        while self._suspects and (worker := self._hands.idle()) is not None:
            self._give(worker, self._suspects.popleft(), now, alone=True)
        while self._pending and (worker := self._hands.free()) is not None:
            self._give(worker, self._pending.popleft(), now, alone=False)
        if self._left() or not self._durations or (worker := self._hands.idle()) is None:
            return
        patience = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(self._durations))
        while worker is not None and (slow := self._hands.straggler(now - patience)) is not None:
            log.warning("shard %s takes long: handed to a second worker", slow.name, extra={"shard": slow.name})
            self._watcher.handed_out_again(slow.name, "straggler", "")
            self._give(worker, slow, now, alone=False)
            worker = self._hands.idle()

    def _give(self, worker: int, unit: Unit, now: float, *, alone: bool) -> None:
        self._hands.give(worker, unit, now, alone=alone)
        self._crew.give(worker, unit)

    def _settle(self, answer: Answer) -> Manifest | None:
        """Take one answer. Returns the manifest it led to, if any."""
        worker, result = answer.worker, answer.result
        if worker not in self._hands:
            return None  # it died or was dismissed a moment ago, and was settled then
        if isinstance(result, Lost):
            return self._bury(worker, result)
        if isinstance(result, Opened):
            self._start(worker, result)
            return None
        given = self._hands.take(worker, answer.unit)
        self._dismiss_if_empty(worker)
        if given is None:
            return None
        if result.manifest is not None:
            self._durations.append(time.monotonic() - given.at)
        return self._account(given, result)

    def _start(self, worker: int, opened: Opened) -> None:
        """A worker is ready; perhaps on a node that is being drained by now."""
        if opened.error:
            raise StageError(opened.error)
        self._hands.start(worker, opened.node)
        self._start_failures = 0
        self.ready_at = self.ready_at or time.perf_counter()
        if opened.node in self._crew.leaving():
            self._clear(opened.node)

    def _account(self, given: Given, outcome: Outcome) -> Manifest | None:
        name = given.unit.name
        if outcome.fatal:
            raise StageError(outcome.error)
        if name in self._done:
            return None  # the second of two workers that had it
        if outcome.manifest is not None:
            self._pause, self._last_commit = 1.0, time.monotonic()
            return self._commit(outcome.manifest, outcome.idle)
        if self._hands.is_held(name):
            return None  # the other worker that has it will say
        if outcome.drained:
            self._again(given, "drained", "")
            return None
        if outcome.transient:
            self._wait_for_storage(outcome.error)
            self._again(given, "storage", outcome.error)
            return None
        return self._charge(given.unit, outcome.error)

    def _commit(self, manifest: Manifest, idle: float) -> Manifest:
        self._done.add(manifest.shard)
        self._hands.done(manifest.shard)
        self._failures.pop(manifest.shard, None)
        mine = (manifest.run, manifest.attempt) == (self._attempt.run, self._attempt.number)
        self._watcher.committed(manifest, mine=mine, idle=idle)
        return manifest

    def _again(self, given: Given, reason: Reason, error: str) -> None:
        """Hand a unit out again, before the others; it is not charged, and one that ran alone will do so again."""
        if not self.stop.is_set():
            self._watcher.handed_out_again(given.unit.name, reason, error)
        (self._suspects if given.alone else self._pending).appendleft(given.unit)

    def _wait_for_storage(self, error: str) -> None:
        """Hold all dispatch for a while, longer each time, and give the run up after STORAGE_PATIENCE without any success."""
        if time.monotonic() < self._paused_until:
            return  # one of those that were under way when storage failed
        if time.monotonic() - self._last_commit > STORAGE_PATIENCE:
            raise StageError(f"storage has not worked for {STORAGE_PATIENCE / 60:.0f} minutes: {error}; run the same command again later")
        log.warning("storage error, pausing %.0f s: %s", self._pause, error)
        self._paused_until, self._pause = time.monotonic() + self._pause, min(2 * self._pause, 30.0)

    def _charge(self, unit: Unit, error: str) -> Manifest | None:
        """Count a failure against a unit: try it again alone, or give it up."""
        failures = self._failures.setdefault(unit.name, [])
        failures.append(error)
        log.warning("shard %s failed (%d of %d): %s", unit.name, len(failures), self._max_failures, error, extra={"shard": unit.name})
        if len(failures) >= self._max_failures:
            manifest = self._give_up(unit, failures)
            self._watcher.given_up(unit.name, failures)
            return self._commit(manifest, 0.0)
        self._watcher.handed_out_again(unit.name, "charged", error)
        self._suspects.append(unit)
        return None

    def _bury(self, worker: int, lost: Lost) -> Manifest | None:
        """A worker is gone. Its units go back; only one that ran alone on a living node is charged."""
        starting, node = self._hands.is_starting(worker), self._hands.node(worker)
        orphans = self._hands.remove(worker)
        self._crew.dismiss(worker)  # should it only be out of reach
        self._watcher.worker_lost(node, with_node=lost.with_node)
        if starting and not lost.with_node:
            self._start_failures += 1
            if self._start_failures >= START_FAILURES and not self._hands.num_ready:
                raise StageError(f"three workers in a row died while starting: {lost.error}; is there enough memory on the nodes?")
        if starting:
            return None
        how, names = "with its node" if lost.with_node else "its process died", [given.unit.name for given in orphans]
        log.warning("a worker was lost (%s) with shards %s", how, names)
        if lost.with_node:
            for given in orphans:
                self._again(given, "node", lost.error)
        elif len(orphans) == 1:
            return self._charge(orphans[0].unit, "the worker died on this shard (out of memory, or a crash in native code)")
        else:
            for given in orphans:
                self._watcher.handed_out_again(given.unit.name, "crash", lost.error)
                self._suspects.append(given.unit)
        return None
