"""How fast work goes lately, from the clock of one process."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 60.0
MARKS = 60
COMMITS = 8


class Pace:
    """Work per second over the last ``WINDOW_SECONDS``, or over the last ``COMMITS`` commits where those took longer.

    Memory does not grow: commits that come close together share a mark.

    Args:
        now: seconds of a monotonic clock, when the work begins.
    """

    def __init__(self, now: float) -> None:
        self._marks = deque([(now, 0.0)])  # when, and all the work until then
        self._total = 0.0

    def add(self, now: float, amount: float) -> None:
        """``amount`` was done by ``now``."""
        self._total += amount
        last = self._marks[-1][0]
        if len(self._marks) > 1 and now - last < WINDOW_SECONDS / MARKS:
            self._marks[-1] = (last, self._total)
        else:
            self._marks.append((now, self._total))
        while len(self._marks) > COMMITS + 1 and now - self._marks[1][0] >= WINDOW_SECONDS:
            self._marks.popleft()

    def rate(self, now: float) -> float | None:
        """Work per second; falls while nothing comes. None before the first commit."""
        if len(self._marks) < 2:
            return None
        kept = [mark for mark in self._marks if now - mark[0] <= WINDOW_SECONDS]
        first = self._marks[max(0, len(self._marks) - max(len(kept), COMMITS) - 1)]
        seconds = now - first[0]
        return (self._total - first[1]) / seconds if seconds > 0 else None
