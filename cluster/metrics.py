"""Numbers of a stage or a training for Prometheus, through Ray's own metrics: nothing to install, nothing to open.

The driver records; the agent on its Ray node serves what was recorded, all metrics with ``ray_`` before their name and counters with
``_total`` behind it. A gauge is told again and again while its work goes on: Ray's agent forgets one that is not, so what has ended, or
whose driver died, has no gauges, and an alert on them ends by itself. Labels are few and bounded: never a shard, a key or a URL.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Literal, Self, get_args

from cluster.attempt import Attempt
from cluster.dataset import Manifest
from cluster.watcher import Reason, Watcher

log = logging.getLogger(__name__)

LABELS = ("stage", "run", "attempt")
"""On every metric: the name beside the progress bar, the run, and the number of the attempt (both empty where nothing is known of them)."""
BOUNDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Upper bounds of the histogram's buckets, in seconds."""
REFRESH_SECONDS = 2.0
"""Gauges are told again so often; Ray's agent forgets them after twice its report interval, by default after 20 s."""


@dataclass(frozen=True)
class Metric:
    """What is measured: a name, and what it says; ``labels`` beside those that every metric has, with the values they can take if known."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    label: str = ""
    values: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which Prometheus finds it."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[self.kind]
        return tuple(f"ray_{self.name}{ending}" for ending in endings)

    @property
    def labels(self) -> tuple[str, ...]:
        """Its labels."""
        return (*LABELS, self.label) if self.label else LABELS


METRICS = {
    metric.name: metric
    for metric in (
        Metric("facemae_shards", "counter", "shards committed by this attempt, those given up too"),
        Metric("facemae_images", "counter", "images committed by this attempt, or seen by a training"),
        Metric("facemae_bytes", "counter", "bytes of the shards committed by this attempt"),
        Metric("facemae_quarantined", "counter", "images left out of the shards committed by this attempt"),
        Metric("facemae_shards_given_up", "counter", "shards quarantined whole after their last failure"),
        Metric("facemae_retries", "counter", "units handed out again", "reason", get_args(Reason)),
        Metric("facemae_worker_losses", "counter", "workers that died, alone or with their node", "cause", ("process", "node")),
        Metric("facemae_step_seconds", "histogram", "seconds of one shard in one step (fetch, compute, publish)", "step"),
        Metric("facemae_device_busy_seconds", "counter", "seconds in which workers' devices computed"),
        Metric("facemae_device_idle_seconds", "counter", "seconds in which workers' devices waited for their input"),
        Metric("facemae_shards_left", "gauge", "shards not yet committed by any attempt, as far as this one knows"),
        Metric("facemae_workers_ready", "gauge", "workers that are ready"),
        Metric("facemae_workers_wanted", "gauge", "workers that there is work for"),
        Metric("facemae_last_progress_time_seconds", "gauge", "Unix time of the last commit or training step, first of the start"),
        Metric("facemae_training_step", "gauge", "steps that a training has done"),
        Metric("facemae_training_steps", "gauge", "steps that a training has in all"),
        Metric("facemae_training_loss", "gauge", "the last values that a training reported: losses, norms, rates", "term"),
    )
}


class Recorder:
    """Records metrics of one piece of work, and tells its gauges again until the block ends. Never raises: a job does not fail for its
    numbers."""

    def __init__(self, stage: str, attempt: Attempt | None) -> None:
        known = (attempt.run, str(attempt.number)) if attempt else ("", "")
        self._labels = dict(zip(LABELS, (stage, *known), strict=True))
        self._gauges: dict[tuple[str, str], float] = {}
        self._ended, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._refresh, name="metrics", daemon=True)

    def begin(self, *names: str) -> None:
        """Counters begin at zero: Prometheus sees no increase from nothing to one."""
        for metric in (METRICS[name] for name in names):
            for value in metric.values or ("",):
                with contextlib.suppress(Exception):  # Ray's inc() takes no zero, what lies beneath it does
                    _instrument(metric.name)._record(0.0, self._tags(metric.name, value))

    def add(self, name: str, amount: float, value: str = "") -> None:
        """Add to a counter."""
        if amount > 0:
            self._do(lambda: _instrument(name).inc(float(amount), self._tags(name, value)))

    def observe(self, name: str, amount: float, value: str) -> None:
        """Count a value in a histogram."""
        self._do(lambda: _instrument(name).observe(float(amount), self._tags(name, value)))

    def set(self, name: str, amount: float, value: str = "") -> None:
        """Set a gauge, and keep it."""
        self._gauges[name, value] = float(amount)
        self._tell(name, value)

    def _tell(self, name: str, value: str) -> None:
        self._do(lambda: _instrument(name).set(self._gauges[name, value], self._tags(name, value)))

    def _tags(self, name: str, value: str) -> dict[str, str]:
        label = METRICS[name].label
        return {**self._labels, label: value} if label else self._labels

    def _do(self, record: Any) -> None:
        try:
            record()
        except Exception as error:  # whatever it is, it costs the numbers, not the job
            if not self._failed:
                log.warning("metrics are not recorded: %s: %s", type(error).__name__, error)
            self._failed = True

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            self._tell_all()

    def _tell_all(self) -> None:
        for name, value in list(self._gauges):
            self._tell(name, value)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._tell_all()  # the last word: the thread may have been about to tell what it read before


class StageMetrics(Watcher):
    """The metrics of one attempt at a stage. ``left``: shards to do. Use as a context manager."""

    def __init__(self, stage: str, attempt: Attempt, left: int) -> None:
        self._recorder, self._left = Recorder(stage, attempt), left

    def __enter__(self) -> Self:
        self._recorder.begin(*(name for name, metric in METRICS.items() if metric.kind == "counter"))
        self._recorder.set("facemae_shards_left", self._left)
        self._progressed()
        self.workers(0, 0)
        self._recorder.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._recorder.__exit__(kind, error, trace)

    def committed(self, manifest: Manifest, *, mine: bool, idle: float) -> None:
        """See Watcher. What another attempt committed is its own to count."""
        self._left -= 1
        self._recorder.set("facemae_shards_left", max(self._left, 0))
        self._progressed()
        if not mine:
            return
        add = self._recorder.add
        add("facemae_shards", 1)
        add("facemae_images", manifest.samples)
        add("facemae_bytes", manifest.num_bytes)
        add("facemae_quarantined", manifest.quarantined)
        add("facemae_device_idle_seconds", idle)
        add("facemae_device_busy_seconds", manifest.seconds.get("compute", 0.0))
        for step, seconds in manifest.seconds.items():
            self._recorder.observe("facemae_step_seconds", seconds, step)

    def handed_out_again(self, unit: str, reason: Reason, error: str) -> None:
        """See Watcher."""
        self._recorder.add("facemae_retries", 1, reason)

    def given_up(self, unit: str, errors: Sequence[str]) -> None:
        """See Watcher."""
        self._recorder.add("facemae_shards_given_up", 1)

    def workers(self, ready: int, wanted: int) -> None:
        """See Watcher."""
        self._recorder.set("facemae_workers_ready", ready)
        self._recorder.set("facemae_workers_wanted", wanted)

    def worker_lost(self, node: str, *, with_node: bool) -> None:
        """See Watcher."""
        self._recorder.add("facemae_worker_losses", 1, "node" if with_node else "process")

    def _progressed(self) -> None:
        self._recorder.set("facemae_last_progress_time_seconds", time.time())


class TrainingMetrics:
    """The metrics of one attempt at a training, from what rank 0 reports to the driver. ``attempt``: None where there is no record of it.
    ``steps``: all there are. Use as a context manager."""

    def __init__(self, stage: str, attempt: Attempt | None, steps: int) -> None:
        self._recorder, self._steps = Recorder(stage, attempt), steps
        self._seen: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        self._recorder.begin("facemae_images")
        self._recorder.set("facemae_training_steps", self._steps)
        self._recorder.set("facemae_last_progress_time_seconds", time.time())
        self._recorder.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._recorder.__exit__(kind, error, trace)

    def report(self, progress: Mapping[str, Any]) -> None:
        """Take the last progress, new or not (cluster/train.py)."""
        if not progress or progress.get("step") == self._seen.get("step"):
            return
        before = self._seen.get("samples", progress["first_sample"])  # a restarted group goes back: that is no negative work
        self._recorder.add("facemae_images", progress["samples"] - before)
        self._recorder.set("facemae_training_step", progress["step"])
        self._recorder.set("facemae_last_progress_time_seconds", time.time())
        for term, value in progress["metrics"].items():
            self._recorder.set("facemae_training_loss", value, term)
        self._seen = progress


@cache
def _instrument(name: str) -> Any:
    """Ray's metric of that name, made once in a process."""
    from ray.util.metrics import Counter, Gauge, Histogram

    metric = METRICS[name]
    if metric.kind == "histogram":
        return Histogram(name, metric.text, BOUNDS, metric.labels)
    return (Counter if metric.kind == "counter" else Gauge)(name, metric.text, metric.labels)
