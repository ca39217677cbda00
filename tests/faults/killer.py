"""Chaos with a report: kills a random matching process every few seconds."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.faults.policy import title

WORKERS = r"ray::Worker\b"
"""The actors of a stage."""


def raylet_of(ip: str) -> str:
    """A pattern for the raylet of the node with this address."""
    return rf"\S*raylet/raylet .*--node_ip_address={re.escape(ip)}\b"


@dataclass(frozen=True)
class Kill:
    """One process that was killed: when (seconds since the epoch), which, what it was, and on which machine."""

    time: float
    pid: int
    title: str
    node: str


class Killer:
    """Kills -9 one random process every ``interval`` seconds, give or take ``jitter`` of it, until ``limit`` are dead or ``stop``.

    Args:
        interval: mean seconds between two kills; the first comes after one interval.
        victims: whom: a pattern that the command line must begin with, or pids.
        within: text that the command line of a victim or of one of its ancestors must hold, so that no other Ray session on the
            machine is hurt: a Ray session's name, or a cluster's folder.
        seed: decides times and choices (among the processes that are there, in the order of their pids).
        jitter: 0 for a regular beat, up to 1.
        limit: kills in all.
    """

    def __init__(
        self,
        interval: float,
        victims: str | Sequence[int],
        within: str,
        seed: int = 0,
        jitter: float = 0.5,
        limit: float = float("inf"),
    ) -> None:
        self._interval, self._victims, self._within = interval, victims, within
        self._rng, self._jitter, self._limit = random.Random(seed), jitter, limit
        self._kills: list[Kill] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> list[Kill]:
        """End, and report every kill."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        return self.report()

    def report(self) -> list[Kill]:
        """Every kill so far."""
        return list(self._kills)

    def _run(self) -> None:
        while len(self._kills) < self._limit and not self._stop.wait(self._pause()):
            victims = self._matching()
            if victims:
                self._kill(self._rng.choice(victims))

    def _pause(self) -> float:
        return self._interval * (1 + self._jitter * self._rng.uniform(-1, 1))

    def _kill(self, victim: psutil.Process) -> None:
        name = title(victim)
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself since it was chosen
            victim.kill()
            self._kills.append(Kill(time.time(), victim.pid, name[:80], socket.gethostname()))

    def _matching(self) -> list[psutil.Process]:
        return sorted((process for process in psutil.process_iter() if self._admits(process)), key=lambda process: process.pid)

    def _admits(self, process: psutil.Process) -> bool:
        if not isinstance(self._victims, str):
            return process.pid in self._victims
        if not re.match(self._victims, title(process)):
            return False
        try:
            family = [process, *process.parents()]
        except psutil.NoSuchProcess:
            return False
        return any(self._within in title(member) for member in family)


def killer_actor(interval: float, victims: str | Sequence[int], seed: int = 0, **options: Any) -> Any:
    """A ``Killer`` as an actor on the driver's node, for the session that Ray is connected to: ``ray.get(actor.start.remote())``."""
    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    actor: Any = ray.remote(Killer)
    placed = actor.options(num_cpus=0, max_restarts=0, scheduling_strategy=here)
    return placed.remote(interval, victims, context.get_session_name(), seed, **options)
