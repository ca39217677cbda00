"""The workers of a stage as the scheduler sees them: hired, given units, drained, dismissed; what they answer comes through one queue.

Behind the protocol stand Ray actors, or in tests and in the benchmark of the driver workers that are only simulated. No call's cost
grows with the number of workers, and none waits for a worker; only ``answers`` waits.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.node import draining_nodes, is_alive, node_of_actor
from cluster.processor import Unit
from cluster.worker import Opened, Outcome

WATCH_SECONDS = 2.0
"""Between two looks at which nodes are being drained and how many workers fit."""


@dataclass(frozen=True)
class Lost:
    """A worker is gone: why, and whether its node went with it."""

    error: str
    with_node: bool


@dataclass(frozen=True)
class Answer:
    """What a worker says: that it has started (``unit`` is empty), how a unit ended, or nothing any more."""

    worker: int
    unit: str
    result: Opened | Outcome | Lost


class Crew(Protocol):
    """Workers by number."""

    def room(self) -> int:
        """How many workers fit the cluster as it is now, at least one (which then waits for an autoscaler)."""

    def leaving(self) -> Set[str]:
        """Nodes that are being drained; the same object as long as nothing has changed."""

    def hire(self) -> int:
        """Start a worker; it will answer when it is ready. Returns its number."""

    def give(self, worker: int, unit: Unit) -> None:
        """Put a unit into a worker's hands."""

    def drain(self, worker: int) -> None:
        """Ask a worker to begin no other unit and to give back what it has not begun."""

    def dismiss(self, worker: int) -> None:
        """End a worker; it answers nothing any more. One that is unknown, or gone, is no error."""

    def answers(self, seconds: float) -> list[Answer]:
        """All answers that have come, in their order; waits for the first one, at most so long."""

    def close(self) -> None:
        """End all workers."""


class RayCrew:
    """Actors of a running Ray cluster.

    Args:
        make: starts one actor of cluster/worker.py.
        room: counts the workers that fit the cluster.
    """

    def __init__(self, make: Callable[[], Any], room: Callable[[], int] = lambda: 1) -> None:
        self._make, self._count_room = make, room
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._gone = set[str | None]()
        self._hired = 0
        self._answers: queue.SimpleQueue[tuple[int, str, Future[Any]]] = queue.SimpleQueue()
        self._room, self._leaving = max(1, room()), frozenset[str]()
        self._closed = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="nodes", daemon=True)
        self._watching.start()

    def room(self) -> int:
        """See Crew."""
        return self._room

    def leaving(self) -> Set[str]:
        """See Crew."""
        return self._leaving

    def hire(self) -> int:
        """See Crew."""
        self._hired += 1
        actor = self._actors[self._hired] = self._make()
        self._expect(self._hired, "", actor.open.remote())
        return self._hired

    def give(self, worker: int, unit: Unit) -> None:
        """See Crew."""
        self._expect(worker, unit.name, self._actors[worker].run.remote(unit))

    def drain(self, worker: int) -> None:
        """See Crew."""
        self._actors[worker].drain.remote()

    def dismiss(self, worker: int) -> None:
        """See Crew."""
        actor = self._actors.pop(worker, None)
        self._nodes.pop(worker, None)
        if actor is not None:
            ray.kill(actor)

    def answers(self, seconds: float) -> list[Answer]:
        """See Crew."""
        found = list[Answer]()
        with contextlib.suppress(queue.Empty):
            found.append(self._read(*self._answers.get(timeout=seconds)))
            while True:
                found.append(self._read(*self._answers.get_nowait()))
        return found

    def close(self) -> None:
        """See Crew."""
        self._closed.set()
        for worker in list(self._actors):
            self.dismiss(worker)
        self._watching.join(WATCH_SECONDS)

    def _expect(self, worker: int, unit: str, ref: ray.ObjectRef) -> None:
        """Queue the answer when it comes. The future keeps the reference, so that Ray frees the answer when it has been read."""
        ref.future().add_done_callback(lambda future: self._answers.put((worker, unit, future)))

    def _read(self, worker: int, unit: str, future: Future[Any]) -> Answer:
        actor = self._actors.get(worker)
        if actor is None:
            return Answer(worker, unit, Lost("dismissed", with_node=False))
        try:
            result = future.result()
        except RayTaskError as error:  # whatever one unit does to the code, it costs that unit
            lines = str(error).strip().splitlines()
            result = Outcome(None, lines[-1] if lines else "no word of why") if unit else Lost(str(error), with_node=False)
        except RayError as error:
            preempted = isinstance(error, RayActorError) and error.preempted
            result = Lost(str(error), preempted or self._is_gone(self._nodes.get(worker) or node_of_actor(actor)))
        if isinstance(result, Opened):
            self._nodes[worker] = result.node
        return Answer(worker, unit, result)

    def _is_gone(self, node: str | None) -> bool:
        """Whether a node is lost. It is asked once for each: many workers go with one, and no node comes back."""
        if node is not None and node not in self._gone and not is_alive(node):
            self._gone.add(node)
        return node in self._gone

    def _watch(self) -> None:
        """Look now and then at what the cluster is becoming. While its head does not answer, nothing has changed."""
        while not self._closed.wait(WATCH_SECONDS):
            with contextlib.suppress(Exception):  # Ray raises what it likes when it is asked while it shuts down
                leaving = draining_nodes()
                if leaving != self._leaving:
                    self._leaving = leaving
                self._room = max(1, self._count_room())
