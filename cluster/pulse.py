"""What a stage's driver says of its progress in its attempt's record: counts and times, no key of a sample and no name of a machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pydantic

from cluster.dataset import Manifest
from cluster.pace import Pace
from cluster.processor import Unit
from cluster.watcher import Reason, Watcher

NAMES = 100
"""Shards that were given up are named up to so many."""


@dataclass(frozen=True)
class Tally:
    """How a stage stands, as one attempt at it knows.

    Attributes:
        stage: its name.
        shards, samples: of the whole stage; samples None where the input does not say how many it holds.
        resumed: shards that were committed before this attempt began.
        done: shards that are committed now, by whomever.
        own_shards, own_samples, own_quarantined: committed by this attempt itself; samples without what was quarantined.
        given_up: shards that this attempt gave up, by name, the first ``NAMES`` of them; own_given_up: how many.
        retries: times that a unit was handed out again.
        workers_ready, workers_wanted: workers.
        waiting: seconds since there is no worker at all, None while there is one.
        seconds: since the attempt began, or until it ended.
        samples_per_second, shards_per_second: of its own work, lately; samples with what was quarantined. None before the first commit.
    """

    stage: str
    shards: int
    samples: int | None
    resumed: int
    done: int
    own_shards: int
    own_samples: int
    own_quarantined: int
    own_given_up: int
    given_up: tuple[str, ...]
    retries: int
    workers_ready: int
    workers_wanted: int
    waiting: float | None
    seconds: float
    samples_per_second: float | None
    shards_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """The tally as plain values."""
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any] | None) -> Tally | None:
        """The inverse; None for none, or for that of another version or of a training."""
        try:
            return pydantic.TypeAdapter(cls).validate_python(content)
        except pydantic.ValidationError:
            return None


class Pulse(Watcher):
    """Counts what a stage does. The driver tells it; the heartbeat's thread takes the tally.

    Args:
        name: of the stage.
        units: all of them.
        committed: names of those that were committed before.
        clock: seconds, monotonic.
    """

    def __init__(self, name: str, units: Sequence[Unit], committed: Collection[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock, self._begun = name, clock, clock()
        sizes = [unit.num_samples for unit in units]
        self._shards, self._samples = len(units), sum(sizes) if all(sizes) else None
        self._resumed = len(committed)
        self._others = self._own = self._own_samples = self._own_quarantined = self._own_given_up = self._retries = 0
        self._given_up: list[str] = []
        self._ready, self._wanted = 0, 0
        self._since: float | None = self._begun  # when the last worker went, or the stage began
        self._pace: tuple[Pace, Pace] | None = None  # samples, shards; from the first worker on
        self._lock = threading.Lock()

    def committed(self, manifest: Manifest, *, mine: bool, idle: float) -> None:
        """See Watcher."""
        with self._lock:
            if not mine:
                self._others += 1
                return
            self._since = None  # somebody works, whether or not the driver counts workers
            self._own += 1
            self._own_samples += manifest.samples
            self._own_quarantined += manifest.quarantined
            now = self._clock()
            self._pace = self._pace or (Pace(self._begun), Pace(self._begun))
            for pace, amount in zip(self._pace, (manifest.samples_in, 1), strict=True):
                pace.add(now, amount)

    def handed_out_again(self, unit: str, reason: Reason, error: str) -> None:
        """See Watcher."""
        with self._lock:
            self._retries += 1

    def given_up(self, unit: str, errors: Sequence[str]) -> None:
        """See Watcher."""
        with self._lock:
            self._own_given_up += 1
            self._given_up = [*self._given_up, unit][:NAMES]

    def workers(self, ready: int, wanted: int) -> None:
        """See Watcher."""
        with self._lock:
            self._ready, self._wanted = ready, wanted
            if ready:
                self._since = None
                self._pace = self._pace or (Pace(self._clock()), Pace(self._clock()))
            elif self._since is None:
                self._since = self._clock()

    def tally(self) -> dict[str, Any]:
        """How it stands now; may be called from any thread."""
        with self._lock:
            now = self._clock()
            samples, shards = (pace.rate(now) for pace in self._pace) if self._pace else (None, None)
            return Tally(
                stage=self._name,
                shards=self._shards,
                samples=self._samples,
                resumed=self._resumed,
                done=self._resumed + self._others + self._own,
                own_shards=self._own,
                own_samples=self._own_samples,
                own_quarantined=self._own_quarantined,
                own_given_up=self._own_given_up,
                given_up=tuple(self._given_up),
                retries=self._retries,
                workers_ready=self._ready,
                workers_wanted=self._wanted,
                waiting=None if self._since is None else round(now - self._since, 1),
                seconds=round(now - self._begun, 1),
                samples_per_second=_rounded(samples),
                shards_per_second=_rounded(shards),
            ).to_json()


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 4)
