"""What a training's driver says of its progress in its attempt's record."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pydantic

from cluster.attempt import Attempt, attempting
from cluster.dataset import fingerprint
from cluster.log import about
from cluster.pace import Pace
from cluster.s3 import AccessDenied
from cluster.store import Store

if TYPE_CHECKING:
    from cluster.train_job import TrainJob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingTally:
    """How a training stands.

    Attributes:
        training: what is trained.
        step, steps: done, and in all; step None while the workers start.
        samples, samples_total: seen, and of the whole training; samples None likewise.
        metrics: means over the last steps.
        workers: how many were asked for.
        waiting: seconds since the attempt began, while its workers have not said anything.
        seconds: since the attempt began, or until it ended.
        samples_per_second: lately; None before the second report.
    """

    training: str
    step: int | None
    steps: int
    samples: int | None
    samples_total: int
    metrics: Mapping[str, float]
    workers: int
    waiting: float | None
    seconds: float
    samples_per_second: float | None

    @classmethod
    def of(cls, content: Mapping[str, Any] | None) -> TrainingTally | None:
        """From the record's plain values; None for none, or for that of another version or of a stage."""
        try:
            return pydantic.TypeAdapter(cls).validate_python(content)
        except pydantic.ValidationError:
            return None


class TrainingPulse:
    """Takes what rank 0 reports; the heartbeat's thread takes the tally. ``attempt``: which this is, where there is a record of it."""

    def __init__(self, job: TrainJob, clock: Callable[[], float] = time.monotonic) -> None:
        self._job, self._clock, self._begun = job, clock, clock()
        self._progress: Mapping[str, Any] = {}
        self._pace: Pace | None = None
        self._lock = threading.Lock()
        self.attempt: Attempt | None = None

    def report(self, progress: Mapping[str, Any]) -> None:
        """Take what the driver knows, as often as it likes."""
        with self._lock:
            if not progress or progress == self._progress:
                return
            gained = progress["samples"] - self._progress.get("samples", progress["samples"])
            if self._pace is None or gained < 0:  # the first report, or a restart from the last checkpoint
                self._pace = Pace(self._clock())
            else:
                self._pace.add(self._clock(), gained)
            self._progress = dict(progress)

    def tally(self) -> dict[str, Any]:
        """How it stands now; may be called from any thread."""
        with self._lock:
            now = self._clock()
            rate = self._pace.rate(now) if self._pace else None
            metrics = {name: float(f"{value:.6g}") for name, value in self._progress.get("metrics", {}).items()}
            tally = TrainingTally(
                training=self._job.label,
                step=self._progress.get("step"),
                steps=self._job.steps,
                samples=self._progress.get("samples"),
                samples_total=self._job.plan.samples_before(self._job.steps),
                metrics=metrics,
                workers=self._job.options.num_workers,
                waiting=None if self._progress else round(now - self._begun, 1),
                seconds=round(now - self._begun, 1),
                samples_per_second=None if rate is None else round(rate, 4),
            )
        return asdict(tally)


@contextlib.contextmanager
def recorded(store: Store, job: TrainJob) -> Iterator[TrainingPulse]:
    """Keep a record of this attempt at a training in ``<run>/attempts``, as stages do. Where the credentials do not allow it the
    training goes on without.

    Raises:
        StoreError: the store cannot be written, or a training of other settings is at work there.
    """
    pulse = TrainingPulse(job)
    with contextlib.ExitStack() as stack:
        try:
            pulse.attempt = stack.enter_context(attempting(store, fingerprint(job.config), log.warning, pulse.tally))
            stack.enter_context(about(run=pulse.attempt.run, attempt=pulse.attempt.number))
        except AccessDenied as error:
            log.warning("facemae status will not know of this training's progress: %s", error)
        yield pulse
