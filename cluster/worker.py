"""The actor of a stage: runs one processor over the units that the driver names."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Manifest
from cluster.log import about, follow
from cluster.processor import Processor, Unit
from cluster.store import NotFound, StoreError


@dataclass(frozen=True)
class Outcome:
    """What a worker says of one unit: its manifest, or why there is none.

    Attributes:
        drained: it was not begun, as asked.
        idle: seconds that the worker's device waited before this unit's compute, since the last one's or since it was ready.
    """

    manifest: Manifest | None
    error: str = ""
    fatal: bool = False
    transient: bool = False
    drained: bool = False
    idle: float = 0.0


@dataclass(frozen=True)
class Opened:
    """What a worker says when it has started: its Ray node, and why it cannot work (empty: it can)."""

    node: str
    error: str = ""


class Worker:
    """The actor that runs one processor over units, several at a time in threads."""

    def __init__(self, processor: Processor[Any], url: str, suffix: str, attempt: Attempt, fingerprint: str, threads: int) -> None:
        follow()
        self._processor, self._threads = processor, threads
        self._dataset_at = (url, suffix)
        self._attempt, self._fingerprint = attempt, fingerprint
        self._computing, self._draining = threading.Lock(), False
        self._ready = time.perf_counter()  # since when the device has nothing to do

    def open(self) -> Opened:
        """Load the processor."""
        node = ray.get_runtime_context().get_node_id()
        try:
            self._dataset = Dataset(*self._dataset_at)
            self._processor.open(self._threads)
        except Exception as error:  # reported by the driver, where the user reads it
            return Opened(node, str(error) or type(error).__name__)
        self._ready = time.perf_counter()
        return Opened(node)

    def drain(self) -> None:
        """Begin no other unit: what is computing or being published is finished, the rest goes back."""
        self._draining = True

    def run(self, unit: Unit) -> Outcome:
        """Fetch, compute and commit one unit, unless another attempt has committed it."""
        with about(run=self._attempt.run, attempt=self._attempt.number, shard=unit.name):
            return self._run(unit)

    def _run(self, unit: Unit) -> Outcome:
        try:
            done = self._dataset.committed(unit.name)
            if done is not None:
                return self._of_others(done)
            started = time.perf_counter()
            fetched = None if self._draining else self._processor.fetch(unit)
            seconds = {"fetch": time.perf_counter() - started}
            with self._computing:
                if self._draining:
                    return Outcome(None, drained=True)
                started = time.perf_counter()
                idle = started - self._ready
                try:
                    data = self._processor.compute(unit, fetched)
                finally:
                    self._ready = time.perf_counter()
                seconds["compute"] = self._ready - started
            del fetched
            mark, attempt = self._fingerprint, self._attempt
            manifest = self._dataset.commit(unit.name, data, fingerprint=mark, attempt=attempt, seconds=seconds)
            return Outcome(manifest, idle=idle)
        except StoreError as error:
            return Outcome(None, str(error), fatal=error.fatal, transient=not error.fatal and not isinstance(error, NotFound))
        except Exception as error:  # whatever one shard does to the code, it costs that shard
            return Outcome(None, f"{type(error).__name__}: {error}")

    def _of_others(self, manifest: Manifest) -> Outcome:
        """The outcome of a unit that was committed before we came to it."""
        if manifest.fingerprint == self._fingerprint:
            return Outcome(manifest)
        where = f"{self._dataset.url}/manifests/{manifest.shard}.json"
        return Outcome(None, f"{where} is of another run, which works here too: choose another output", fatal=True)
