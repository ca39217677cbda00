"""What a stage tells those who watch it: the progress bar, the metrics, the attempt's record in the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cluster.dataset import Manifest

Reason = Literal["charged", "crash", "storage", "node", "drained", "straggler"]
"""Why a unit is handed out again: charged to it, its worker died with several in hand, storage did not answer, its worker's node was
lost, its worker drained, it was slow."""


class Watcher:
    """Told by the driver of everything that happens in a stage, on the driver's thread. Each method does nothing by itself; none may
    raise or take long."""

    def committed(self, manifest: Manifest, *, mine: bool, idle: float) -> None:
        """A shard is committed. ``mine``: by this attempt. ``idle``: seconds that its worker's device waited for its input."""

    def handed_out_again(self, unit: str, reason: Reason, error: str) -> None:
        """A unit goes to another worker, or to the same one once more."""

    def given_up(self, unit: str, errors: Sequence[str]) -> None:
        """A unit failed for the last time and was quarantined whole; its manifest is told of by ``committed`` too."""

    def workers(self, ready: int, wanted: int) -> None:
        """How many workers are ready, of how many that are wanted now; told when it changes."""

    def worker_lost(self, node: str, *, with_node: bool) -> None:
        """A worker's process died on a Ray node, or with it."""


class Watchers(Watcher):
    """Several watchers as one."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def committed(self, manifest: Manifest, *, mine: bool, idle: float) -> None:
        """See Watcher."""
        for watcher in self._watchers:
            watcher.committed(manifest, mine=mine, idle=idle)

    def handed_out_again(self, unit: str, reason: Reason, error: str) -> None:
        """See Watcher."""
        for watcher in self._watchers:
            watcher.handed_out_again(unit, reason, error)

    def given_up(self, unit: str, errors: Sequence[str]) -> None:
        """See Watcher."""
        for watcher in self._watchers:
            watcher.given_up(unit, errors)

    def workers(self, ready: int, wanted: int) -> None:
        """See Watcher."""
        for watcher in self._watchers:
            watcher.workers(ready, wanted)

    def worker_lost(self, node: str, *, with_node: bool) -> None:
        """See Watcher."""
        for watcher in self._watchers:
            watcher.worker_lost(node, with_node=with_node)
