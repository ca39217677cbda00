"""The progress bar of a stage: images, rate, time left, shards and quarantine."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from types import TracebackType

from tqdm import tqdm

from cluster.dataset import Manifest
from cluster.processor import Unit
from cluster.watcher import Watcher


class Progress(Watcher):
    """Counts images where the units know how many they hold, and shards otherwise. Redraws rarely where nobody watches a terminal."""

    def __init__(self, name: str, units: Sequence[Unit], committed: Collection[str]) -> None:
        self._sizes = {unit.name: unit.num_samples for unit in units}
        self._by_image = all(self._sizes.values())
        self._quarantined, self._done, self._total = 0, len(committed), len(units)
        self._bar = tqdm(
            desc=name,
            total=sum(self._sizes.values()) if self._by_image else len(units),
            initial=sum(map(self._weight, committed)),
            unit=" images" if self._by_image else " shards",
            mininterval=0.5 if sys.stderr.isatty() else 5.0,
            file=sys.stderr,
        )

    def advance(self, manifest: Manifest) -> None:
        """Count one committed shard."""
        self._done += 1
        self._quarantined += manifest.quarantined
        self._bar.set_postfix_str(f"{self._done}/{self._total} shards, {self._quarantined} quarantined", refresh=False)
        self._bar.update(self._weight(manifest.shard))

    def committed(self, manifest: Manifest, *, mine: bool, idle: float) -> None:
        """See Watcher."""
        self.advance(manifest)

    def _weight(self, shard: str) -> int:
        return self._sizes.get(shard, 0) if self._by_image else 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
