"""Kills training workers or their driver at published steps, after a delay from a seed, and keeps a list of what it did."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from cluster.checkpoint import Checkpoints
from cluster.store import open_store


@dataclass(frozen=True)
class TrainingKill:
    """One kill: what, when (time.time()), whom, and at which newest published step."""

    what: str
    seconds: float
    pids: tuple[int, ...]
    step: int
    seed: int


class TrainingKiller(threading.Thread):
    """Does deeds one after the other, each once the run has published that step, which must lie beyond what it has published before,
    a damaged checkpoint included.

    Args:
        url: the run.
        driver: pid of the driver.
        deeds: (step, what): worker, workers and driver are killed by SIGKILL, stop is a SIGTERM to the driver.
        seed: of the delays and of the choice of a worker.

    Attributes:
        kills: what was done.
    """

    def __init__(self, url: str, driver: int, deeds: Sequence[tuple[int, str]], seed: int) -> None:
        super().__init__(daemon=True)
        self.kills: list[TrainingKill] = []
        self._url, self._driver, self._deeds, self._seed = url, psutil.Process(driver), deeds, seed
        self._random = random.Random(seed)

    def run(self) -> None:
        checkpoints = Checkpoints(open_store(self._url))
        for step, what in self._deeds:
            while max(checkpoints.steps(), default=0) < step or not trainers_of(self._driver):
                if not alive(self._driver):
                    return
                time.sleep(0.02)
            time.sleep(self._random.uniform(0, 0.2))
            victims = self._victims(what)
            published = max(checkpoints.steps(), default=0)
            moment = time.time()
            for pid in victims:
                os.kill(pid, signal.SIGTERM if what == "stop" else signal.SIGKILL)
            self.kills.append(TrainingKill(what, moment, tuple(victims), published, self._seed))

    def _victims(self, what: str) -> list[int]:
        if what in ("driver", "stop"):
            return [self._driver.pid]
        workers = [process.pid for process in trainers_of(self._driver)]
        return workers if what == "workers" else [self._random.choice(workers)]


def family(process: psutil.Process) -> list[psutil.Process]:
    """All that it started and that is still there."""
    try:
        return [child for child in process.children(recursive=True) if alive(child)]
    except psutil.NoSuchProcess:
        return []


def trainers_of(process: psutil.Process) -> list[psutil.Process]:
    """The training workers among its family."""
    return [child for child in family(process) if _name(child).startswith("ray::RayTrainW")]


def alive(process: psutil.Process) -> bool:
    """True unless it is gone, or dead and only not collected yet (a container's first process may collect nobody)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
