"""The driver's half of a stage: which worker gets which unit, and what happens when one fails, dies or is slow.

Near the end, when no unit waits for a worker, one that has been in a worker's hands for much longer than usual is handed to an idle
worker too. The first commit wins; what the slow one still does comes to nothing.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.dataset import Manifest
from cluster.processor import Unit
from cluster.worker import Outcome

log = logging.getLogger(__name__)

STORAGE_PATIENCE = 600.0
"""Seconds without a single commit, on a store that keeps failing, before a stage gives up."""

STRAGGLER_FACTOR = 2.0
STRAGGLER_SECONDS = 2.0
"""A unit is handed out again when it has been in hand this many times as long as the median, and at least so long."""

GiveUp = Callable[[Unit, Sequence[str]], Manifest]
"""Quarantines a unit whole, given the errors of its tries."""


class StageError(RuntimeError):
    """The stage cannot go on; the message says why and what to do."""


class Interrupted(RuntimeError):
    """The stage was asked to stop (SIGTERM, SIGINT) and has drained. Everything committed stays; run it again to go on."""


@dataclass
class _Lane:
    """One worker as the driver sees it: its handle, where it runs, and the units in its hands."""

    worker: Any
    opening: ray.ObjectRef | None
    node: str = ""
    units: dict[ray.ObjectRef, _Given] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True)
class _Given:
    """A unit in a worker's hands, and when it was given."""

    unit: Unit
    at: float


class Scheduler:
    """Hands units to workers until all are committed or given up."""

    def __init__(
        self, make_worker: Callable[[], Any], units: Sequence[Unit], give_up: GiveUp, *, in_flight: int, max_failures: int
    ) -> None:
        self._make_worker, self._give_up = make_worker, give_up
        self._in_flight, self._max_failures = in_flight, max_failures
        self._pending, self._suspects = deque(units), deque[Unit]()
        self._failures: dict[str, list[str]] = {}
        self._done, self._durations = set[str](), deque[float](maxlen=99)
        self._lanes: list[_Lane] = []
        self._start_failures = 0
        self._pause, self._paused_until, self._last_commit = 1.0, 0.0, time.monotonic()
        self.stop = threading.Event()
        self.ready_at: float | None = None

    def run(self, num_workers: int) -> Iterator[Manifest]:
        """Yield manifests as they are committed. Raises StageError on a fatal error, Interrupted after draining on ``stop``."""
        draining = False
        try:
            while self._busy() or ((self._pending or self._suspects) and not self.stop.is_set()):
                if self.stop.is_set() and not draining:
                    draining = True
                    for lane in self._lanes:
                        lane.worker.drain.remote()
                self._hire(num_workers)
                self._dispatch()
                refs = [ref for lane in self._lanes for ref in ([lane.opening] if lane.opening else lane.units)]
                for ref in ray.wait(refs, num_returns=1, timeout=0.5)[0] if refs else _idle():
                    manifest = self._settle(ref)
                    if manifest is not None:
                        self._done.add(manifest.shard)
                        yield manifest
            if self.stop.is_set() and (self._pending or self._suspects):
                left = len(self._pending) + len(self._suspects)
                raise Interrupted(f"stopped as asked: all work in hand was committed, {left} shards are left; run the same command again")
        finally:
            for lane in self._lanes:
                ray.kill(lane.worker)

    def _busy(self) -> bool:
        return any(given.unit.name not in self._done for lane in self._lanes for given in lane.units.values())

    def _in_hand(self, unit: Unit) -> int:
        """How many workers have the unit."""
        return sum(given.unit.name == unit.name for lane in self._lanes for given in lane.units.values())

    def _hire(self, num_workers: int) -> None:
        """Start workers for the work that is left, also in place of dead ones."""
        wanted = min(num_workers, len(self._pending) + len(self._suspects) + sum(bool(lane.units) for lane in self._lanes))
        for _ in range(0 if self.stop.is_set() else wanted - len(self._lanes)):
            worker = self._make_worker()
            self._lanes.append(_Lane(worker, worker.open.remote()))

    def _dispatch(self) -> None:
        """One unit to each worker in turn, so that few units spread over all; a suspect gets a worker of its own."""
        if self.stop.is_set() or time.monotonic() < self._paused_until:
            return
        ready = [lane for lane in self._lanes if lane.opening is None]
        for lane in ready:
            if self._suspects and not lane.units:
                self._give(lane, self._suspects.popleft(), alone=True)
        for depth in range(self._in_flight):
            for lane in ready:
                if self._pending and not lane.alone and len(lane.units) == depth:
                    self._give(lane, self._pending.popleft(), alone=False)
        for lane in ready:
            straggler = None if lane.units else self._straggler()
            if straggler is not None:
                log.warning("shard %s takes long: handed to a second worker", straggler.name, extra={"shard": straggler.name})
                self._give(lane, straggler, alone=False)

    def _straggler(self) -> Unit | None:
        """The unit that has been in one worker's hands for longest, if that is much longer than usual."""
        if self._pending or self._suspects or not self._durations:
            return None
        patience = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(self._durations))
        latest = time.monotonic() - patience
        held = [given for lane in self._lanes if not lane.alone for given in lane.units.values() if given.at < latest]
        slow = [given for given in held if given.unit.name not in self._done and self._in_hand(given.unit) == 1]
        return min(slow, key=lambda given: given.at).unit if slow else None

    def _give(self, lane: _Lane, unit: Unit, *, alone: bool) -> None:
        lane.alone = alone
        lane.units[lane.worker.run.remote(unit)] = _Given(unit, time.monotonic())

    def _settle(self, ref: ray.ObjectRef) -> Manifest | None:
        """Take one finished call. Returns the manifest it led to, if any."""
        lane = next((lane for lane in self._lanes if ref == lane.opening or ref in lane.units), None)
        if lane is None:
            return None  # its worker died a moment ago, and was settled then
        try:
            result = ray.get(ref)
        except RayActorError as error:
            return self._bury(lane, error)
        if ref == lane.opening:
            if result.error:
                raise StageError(result.error)
            lane.opening, lane.node, self._start_failures = None, result.node, 0
            self.ready_at = self.ready_at or time.perf_counter()
            return None
        given = lane.units.pop(ref)
        lane.alone = lane.alone and bool(lane.units)
        if result.manifest is not None:
            self._durations.append(time.monotonic() - given.at)
        return self._account(given.unit, result)

    def _account(self, unit: Unit, outcome: Outcome) -> Manifest | None:
        if outcome.fatal:
            raise StageError(outcome.error)
        if unit.name in self._done:
            return None  # the second of two workers that had it
        if outcome.manifest is not None:
            self._pause, self._last_commit = 1.0, time.monotonic()
            return outcome.manifest
        if self._in_hand(unit):
            return None  # the other worker that has it will say
        if outcome.drained:
            self._pending.append(unit)
            return None
        if outcome.transient:
            self._wait_for_storage(outcome.error)
            self._pending.appendleft(unit)
            return None
        return self._charge(unit, outcome.error)

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
            return self._give_up(unit, failures)
        self._suspects.append(unit)
        return None

    def _bury(self, lane: _Lane, error: RayActorError) -> Manifest | None:
        """A worker is gone. Its units go back; only one that ran alone on a living node is charged."""
        self._lanes.remove(lane)
        if lane.opening is not None:
            self._start_failures += 1
            if self._start_failures >= 3:
                raise StageError(f"three workers in a row died while starting: {error}; is there enough memory on the nodes?")
            return None
        units = [given.unit for given in lane.units.values() if given.unit.name not in self._done and not self._in_hand(given.unit)]
        lost_node = getattr(error, "preempted", False) or not _is_alive(lane.node)
        log.warning("a worker was lost (%s) with shards %s", "with its node" if lost_node else "its process died", [u.name for u in units])
        if lost_node:
            self._pending.extendleft(units)
        elif len(units) == 1:
            return self._charge(units[0], "the worker died on this shard (out of memory, or a crash in native code)")
        else:
            self._suspects.extend(units)
        return None


def _idle() -> list[ray.ObjectRef]:
    """Nothing can be waited for just now: all dispatch is paused."""
    time.sleep(0.2)
    return []


def _is_alive(node: str) -> bool:
    return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())
