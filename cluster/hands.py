"""Who holds what: the workers of a stage and the units in their hands. Every step costs the same however many there are."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from cluster.processor import Unit


@dataclass(frozen=True)
class Given:
    """A unit in a worker's hands, since when, and whether the worker has it for itself alone."""

    unit: Unit
    at: float
    alone: bool


@dataclass
class _Lane:
    """One worker: its node (empty while it starts), its units by name, whether it takes no more, and among which it waits for work."""

    node: str = ""
    units: dict[str, Given] = field(default_factory=dict)
    leaving: bool = False
    rank: int | None = None


class Hands:
    """The hands of all workers, each with room for ``in_flight`` units.

    Attributes:
        num_ready: workers that have started and are not leaving.
        num_staying: workers that are not leaving, started or not.
        num_busy: workers with anything in hand.
    """

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._lanes: dict[int, _Lane] = {}
        self._nodes: dict[str, set[int]] = {}
        self._holders: dict[str, set[int]] = {}  # of the units that are not done
        self._by_load = [OrderedDict[int, None]() for _ in range(in_flight)]  # workers with room, by how much they hold
        self._oldest: list[tuple[float, str, int]] = []  # heap of units in hand; some entries are out of date
        self.num_ready = self.num_staying = self.num_busy = 0

    def __contains__(self, worker: int) -> bool:
        return worker in self._lanes

    def __len__(self) -> int:
        """Units in hand that are not done."""
        return len(self._holders)

    def add(self, worker: int) -> None:
        """A worker is starting."""
        self._lanes[worker] = _Lane()
        self.num_staying += 1

    def start(self, worker: int, node: str) -> None:
        """A worker is ready, on a node."""
        self._lanes[worker].node = node
        self._nodes.setdefault(node, set()).add(worker)
        self.num_ready += 1
        self._sort(worker)

    def is_starting(self, worker: int) -> bool:
        """Whether a worker is not ready yet."""
        return not self._lanes[worker].node

    def workers(self) -> Collection[int]:
        """All of them."""
        return self._lanes.keys()

    def load(self, worker: int) -> int:
        """How many units a worker holds."""
        return len(self._lanes[worker].units)

    def node(self, worker: int) -> str:
        """A worker's node; empty while it starts."""
        return self._lanes[worker].node

    def on_node(self, node: str) -> list[int]:
        """The workers of a node that are not leaving it."""
        return [worker for worker in self._nodes.get(node, ()) if not self._lanes[worker].leaving]

    def leave(self, worker: int) -> None:
        """A worker takes no more."""
        lane = self._lanes[worker]
        lane.leaving = True
        self.num_staying -= 1
        self.num_ready -= bool(lane.node)
        self._sort(worker)

    def is_leaving(self, worker: int) -> bool:
        """Whether a worker takes no more."""
        return self._lanes[worker].leaving

    def idle(self) -> int | None:
        """The worker that has been idle for longest, if there is one."""
        return next(iter(self._by_load[0]), None)

    def free(self) -> int | None:
        """The worker with the least in hand, if any has room; of several the one that has waited for longest."""
        return next((next(iter(workers)) for workers in self._by_load if workers), None)

    def give(self, worker: int, unit: Unit, now: float, *, alone: bool) -> None:
        """A unit goes into a worker's hands."""
        lane = self._lanes[worker]
        self.num_busy += not lane.units
        lane.units[unit.name] = Given(unit, now, alone)
        self._holders.setdefault(unit.name, set()).add(worker)
        if not alone:
            self._remember(worker, lane.units[unit.name])
        self._sort(worker)

    def take(self, worker: int, name: str) -> Given | None:
        """A unit leaves a worker's hands; None where the worker did not have it."""
        lane = self._lanes.get(worker)
        given = lane.units.pop(name, None) if lane is not None else None
        if lane is None or given is None:
            return None
        self.num_busy -= not lane.units
        self._release(worker, name)
        self._sort(worker)
        return given

    def done(self, name: str) -> None:
        """A unit is done: whoever else still has it, has it for nothing."""
        self._holders.pop(name, None)

    def is_held(self, name: str) -> bool:
        """Whether a unit that is not done is in anybody's hands."""
        return name in self._holders

    def remove(self, worker: int) -> list[Given]:
        """A worker is gone. Returns what it held that nobody else holds and that is not done."""
        lane = self._lanes[worker]
        if not lane.leaving:
            self.leave(worker)
        del self._lanes[worker]
        self.num_busy -= bool(lane.units)
        self._nodes.get(lane.node, set()).discard(worker)
        orphans = [given for name, given in lane.units.items() if worker in self._holders.get(name, ())]
        for given in orphans:
            self._release(worker, given.unit.name)
        return [given for given in orphans if not self.is_held(given.unit.name)]

    def straggler(self, before: float) -> Unit | None:
        """The unit that has been in one worker's hands for longest, if it was given before a moment. One that runs alone is none."""
        while self._oldest:
            at, name, worker = self._oldest[0]
            holders = self._holders.get(name, ())
            if len(holders) == 1 and self._is_current(at, name, worker):
                return self._lanes[worker].units[name].unit if at < before else None
            heapq.heappop(self._oldest)  # done, given back, or in two workers' hands
        return None

    def _release(self, worker: int, name: str) -> None:
        """A worker holds a unit no longer; the only one that still does may be a straggler again."""
        holders = self._holders.get(name)
        if holders is None:
            return
        holders.discard(worker)
        if not holders:
            del self._holders[name]
        elif len(holders) == 1:
            other = next(iter(holders))
            self._remember(other, self._lanes[other].units[name])

    def _remember(self, worker: int, given: Given) -> None:
        heapq.heappush(self._oldest, (given.at, given.unit.name, worker))
        if len(self._oldest) > 64 + 4 * self._in_flight * len(self._lanes):
            self._oldest = [entry for entry in self._oldest if self._is_current(*entry)]
            heapq.heapify(self._oldest)

    def _is_current(self, at: float, name: str, worker: int) -> bool:
        """Whether an entry of the heap still holds: the worker was given the unit then, and it is not done."""
        lane = self._lanes.get(worker)
        given = lane.units.get(name) if lane is not None else None
        return given is not None and given.at == at and worker in self._holders.get(name, ())

    def _sort(self, worker: int) -> None:
        """Put a worker where ``idle`` and ``free`` find it, if it has room."""
        lane = self._lanes[worker]
        if lane.rank is not None:
            del self._by_load[lane.rank][worker]
        closed = not lane.node or lane.leaving or len(lane.units) >= self._in_flight or any(given.alone for given in lane.units.values())
        lane.rank = None if closed else len(lane.units)
        if lane.rank is not None:
            self._by_load[lane.rank][worker] = None
