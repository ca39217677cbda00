"""The progress bar of a stage: images, rate, time left, shards and quarantine."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Collection, Sequence
from types import TracebackType

from tqdm import tqdm

from cluster.dataset import Manifest
from cluster.log import is_json
from cluster.processor import Unit

log = logging.getLogger(__name__)
LINE_SECONDS = 30.0
"""Where log lines are JSON, a line so often takes the bar's place."""


class Progress:
    """Counts images where the units know how many they hold, and shards otherwise. Redraws rarely where nobody watches a terminal."""

    def __init__(self, name: str, units: Sequence[Unit], committed: Collection[str]) -> None:
        self._sizes = {unit.name: unit.num_samples for unit in units}
        self._by_image = all(self._sizes.values())
        self._quarantined, self._done, self._total = 0, len(committed), len(units)
        self._name, self._lines, self._told = name, is_json(), time.monotonic()
        self._bar = tqdm(
            desc=name,
            total=sum(self._sizes.values()) if self._by_image else len(units),
            initial=sum(map(self._weight, committed)),
            unit=" images" if self._by_image else " shards",
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
            file=sys.stderr,
            disable=self._lines,
        )

    def advance(self, manifest: Manifest) -> None:
        """Count one committed shard."""
        self._done += 1
        self._quarantined += manifest.quarantined
        if self._lines and (self._done == self._total or time.monotonic() - self._told >= LINE_SECONDS):
            self._told = time.monotonic()
            log.info("%s: %d of %d shards, %d quarantined", self._name, self._done, self._total, self._quarantined)
        self._bar.set_postfix_str(f"{self._done}/{self._total} shards, {self._quarantined} quarantined", refresh=False)
        self._bar.update(self._weight(manifest.shard))

    def _weight(self, shard: str) -> int:
        return self._sizes.get(shard, 0) if self._by_image else 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
