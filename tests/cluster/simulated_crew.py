"""Workers that are only simulated: no Ray, no processes. Each sleeps over a unit and says that it is done, unless told otherwise."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable, Set

from cluster.crew import Answer, Lost
from cluster.dataset import Labels, Manifest
from cluster.processor import Unit
from cluster.worker import Opened, Outcome

Act = Callable[[int, Unit], "Outcome | Lost | None"]
"""What a worker makes of a unit; None: the usual."""


class SimulatedCrew:
    """A crew by the clock.

    Args:
        seconds: what a unit takes a worker.
        act: decides what comes of one; ``Lost`` is the end of the worker.
        room: workers that fit.
        per_node: workers on one node; nodes are named n0, n1, ...

    Attributes:
        calls: how often each method was called.
        given: worker and unit, in the order in which they were handed out.
    """

    def __init__(self, seconds: float = 0.0, act: Act = lambda _worker, _unit: None, room: int = 1, per_node: int = 8) -> None:
        self._seconds, self._act, self._room, self._per_node = seconds, act, room, per_node
        self._due: list[tuple[float, int, Answer]] = []
        self._order = itertools.count()
        self._free_at: dict[int, float] = {}
        self._drained = set[int]()
        self.nodes_leaving = frozenset[str]()
        self.calls = Counter[str]()
        self.given: list[tuple[int, str]] = []

    def room(self) -> int:
        return self._room

    def leaving(self) -> Set[str]:
        return self.nodes_leaving

    def hire(self) -> int:
        self.calls["hire"] += 1
        worker = self.calls["hire"]
        self._free_at[worker] = time.monotonic()
        self._answer(time.monotonic(), Answer(worker, "", Opened(self.node_of(worker))))
        return worker

    def give(self, worker: int, unit: Unit) -> None:
        self.calls["give"] += 1
        self.given.append((worker, unit.name))
        result = self._act(worker, unit) or Outcome(manifest_of(unit))
        at = self._free_at[worker] = max(time.monotonic(), self._free_at[worker]) + self._seconds
        self._answer(at, Answer(worker, unit.name, result))

    def drain(self, worker: int) -> None:
        """What has not begun goes back: all but the first of what the worker still has to say."""
        self.calls["drain"] += 1
        mine = sorted(entry for entry in self._due if entry[2].worker == worker and entry[2].unit)
        for entry in mine[1:]:
            self._due.remove(entry)
            self._due.append((0.0, entry[1], Answer(worker, entry[2].unit, Outcome(None, drained=True))))
        heapq.heapify(self._due)

    def dismiss(self, worker: int) -> None:
        self.calls["dismiss"] += 1
        self._free_at.pop(worker, None)

    def answers(self, seconds: float) -> list[Answer]:
        self.calls["answers"] += 1
        first = self._due[0][0] if self._due else float("inf")
        time.sleep(max(0.0, min(seconds, first - time.monotonic())))
        found = []
        while self._due and self._due[0][0] <= time.monotonic():
            answer = heapq.heappop(self._due)[2]
            if answer.worker in self._free_at:
                found.append(answer)
        return found

    def close(self) -> None:
        self.calls["close"] += 1

    def node_of(self, worker: int) -> str:
        """The node of a worker."""
        return f"n{(worker - 1) // self._per_node}"

    def _answer(self, at: float, answer: Answer) -> None:
        heapq.heappush(self._due, (at, next(self._order), answer))


def manifest_of(unit: Unit, run: str = "run", attempt: int = 1) -> Manifest:
    """The commit of a unit without a byte of data."""
    return Manifest(unit.name, None, None, 0, 0, 0, 0, Labels(), "f", run, attempt)
