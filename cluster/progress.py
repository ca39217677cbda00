"""The progress bar of a stage: images, rate, time left, shards and quarantine; and what it waits for."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Collection, Sequence
from types import TracebackType

from tqdm import tqdm

from cluster.dataset import Manifest
from cluster.log import is_json
from cluster.processor import Unit
from cluster.watcher import Watcher

FIRST_SECONDS, REMIND_SECONDS = 10.0, 60.0
"""When a stage without a worker says so where stderr is no terminal, and how often again."""

LINE_SECONDS = 30.0
"""Where log lines are JSON, a line so often takes the bar's place."""

log = logging.getLogger(__name__)


class Progress(Watcher):
    """Counts images where the units know how many they hold, and shards otherwise. Redraws rarely where nobody watches a terminal."""

    def __init__(self, name: str, units: Sequence[Unit], committed: Collection[str]) -> None:
        self._name = name
        self._sizes = {unit.name: unit.num_samples for unit in units}
        self._by_image = all(self._sizes.values())
        self._quarantined, self._done, self._total = 0, len(committed), len(units)
        self._lines, self._told = is_json(), time.monotonic()
        self._waiting: _Waiting | None = None
        self._bar = tqdm(
            desc=name,
            total=sum(self._sizes.values()) if self._by_image else len(units),
            initial=sum(map(self._weight, committed)),
            unit=" images" if self._by_image else " shards",
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
            file=sys.stderr,
            disable=self._lines,
        )

    def committed(self, manifest: Manifest, *, mine: bool, idle: float) -> None:
        """See Watcher."""
        self._done += 1
        self._quarantined += manifest.quarantined
        if self._lines and (self._done == self._total or time.monotonic() - self._told >= LINE_SECONDS):
            self._told = time.monotonic()
            log.info("%s: %d of %d shards, %d quarantined", self._name, self._done, self._total, self._quarantined)
        self._bar.set_postfix_str(f"{self._done}/{self._total} shards, {self._quarantined} quarantined", refresh=False)
        self._bar.update(self._weight(manifest.shard))

    def workers(self, ready: int, wanted: int) -> None:
        """See Watcher."""
        if ready or not wanted:
            self._end_waiting(f"{ready} of {wanted} workers are ready")
            return
        self._waiting = self._waiting or _Waiting(self._name)
        self._waiting.text = f"waiting for workers: 0 of {wanted}"
        self._bar.set_postfix_str(self._waiting.text)

    def _end_waiting(self, text: str) -> None:
        if self._waiting is not None:
            self._waiting.end(text)
            self._waiting = None
            self._bar.set_postfix_str("")

    def _weight(self, shard: str) -> int:
        return self._sizes.get(shard, 0) if self._by_image else 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._waiting is not None:
            self._waiting.end("")
        self._bar.close()


class _Waiting:
    """Plain lines on a stderr that is no terminal: what is waited for, after a while and then again and again."""

    def __init__(self, name: str) -> None:
        self._name, self.text, self._told = name, "", False
        self._ended = threading.Event()
        if not sys.stderr.isatty():
            threading.Thread(target=self._remind, name="waiting", daemon=True).start()

    def end(self, text: str) -> None:
        """No more waiting; why is said where somebody was told of it."""
        self._ended.set()
        if text and self._told:
            self._write(text)

    def _remind(self) -> None:
        since, pause = time.monotonic(), FIRST_SECONDS
        while not self._ended.wait(pause):
            self._write(f"{self.text}, for {time.monotonic() - since:.0f} s; `ray status` says what the cluster lacks")
            self._told, pause = True, REMIND_SECONDS

    def _write(self, text: str) -> None:
        if is_json():
            log.info("%s: %s", self._name, text)
            return
        tqdm.write(f"{self._name}: {text}", file=sys.stderr)
