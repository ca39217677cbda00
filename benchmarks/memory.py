"""The peak memory of every process that a piece of work starts, by phase, as the kernel counts it (VmHWM)."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil

INTERVAL = 0.1
"""Seconds between two looks. The kernel keeps each peak, so a look need only come once near a process's end."""


@dataclass
class Peaks:
    """Peaks of one phase.

    Attributes:
        processes: process id -> (what it is, the most bytes it held). Pages that processes share (Ray's object store) count in each.
    """

    processes: dict[int, tuple[str, int]] = field(default_factory=dict)

    @property
    def largest(self) -> tuple[str, int]:
        """The process that held most."""
        return max(self.processes.values(), key=lambda item: item[1], default=("none", 0))

    @property
    def total(self) -> int:
        """The sum of the peaks: at least what all held at any one moment."""
        return sum(size for _, size in self.processes.values())

    def by_name(self) -> dict[str, list[int]]:
        """The peaks of each kind of process, largest first."""
        found: dict[str, list[int]] = {}
        for name, size in sorted(self.processes.values(), key=lambda item: -item[1]):
            found.setdefault(name, []).append(size)
        return found


class PeakMemory:
    """Watches a process and all that it starts, as a context manager; ``phase`` begins a new count.

    Args:
        pid: the process; this one by default.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._root = pid or os.getpid()
        self._peaks = Peaks()
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def phase(self) -> Peaks:
        """The peaks so far; those of the processes that live on are set back to what they hold now."""
        with self._lock:
            self._look()
            done, self._peaks = self._peaks, Peaks()
            for process in self._processes():
                with contextlib.suppress(OSError):  # it has just ended
                    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        return done

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL):
            with self._lock:
                self._look()

    def _look(self) -> None:
        for process in self._processes():
            with contextlib.suppress(OSError, psutil.Error):
                size = peak_bytes(process.pid)
                if size >= self._peaks.processes.get(process.pid, ("", 0))[1]:
                    self._peaks.processes[process.pid] = (_name(process), size)

    def _processes(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._root)
            yield from (root, *root.children(recursive=True))


def peak_bytes(pid: int) -> int:
    """The most memory a process held since it began, or since its peak was set back. Raises OSError when it is gone."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0  # a process that has ended but was not waited for has none


def _name(process: psutil.Process) -> str:
    """A Ray worker by what it runs ("ray::GalleryShard.search" -> "GalleryShard"), any other by its program."""
    title = (process.cmdline() or [process.name()])[0]
    return title.removeprefix("ray::").partition(".")[0] if title.startswith("ray::") else Path(title).name
