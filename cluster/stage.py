"""The one way every shard-wise job runs: units of work through a processor into a data set, resumable.

The driver lists the units, takes away those whose manifest is there, and hands the rest out by name to a pool of Ray actors; no image
passes through the driver or Ray's object store. A worker holds a few units at once: it fetches one and publishes another while it
computes a third, so that storage hides behind the device, and memory is bounded by the units in flight.

An error is fatal (wrong credentials, no such bucket, weights that do not load: the run ends with it), transient (storage does not answer:
everything waits) or charged to its unit, which is tried again; a unit that fails ``max_failures`` times is quarantined whole, with the
evidence. A unit under suspicion runs alone on its worker, so that a crash is charged to the culprit. A lost node or a preemption is
charged to no unit. Any number of attempts may work on one output: the first commit of a shard wins, and a worker passes over what it
finds committed.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray

from cluster.attempt import Attempt, attempting
from cluster.crew import RayCrew
from cluster.dataset import Dataset, Labels, Manifest, ShardData, fingerprint
from cluster.log import about
from cluster.metrics import StageMetrics
from cluster.node import resources
from cluster.processor import Processor, Unit, UnitT
from cluster.progress import Progress
from cluster.pulse import Pulse
from cluster.scheduler import Interrupted, Scheduler, StageError
from cluster.shard import Rejected
from cluster.store import require_conditional_put
from cluster.watcher import Watchers
from cluster.worker import Worker

log = logging.getLogger(__name__)

__all__ = ["Interrupted", "Processor", "StageError", "StageOptions", "StageResult", "Unit", "run_stage"]


@dataclass(frozen=True)
class StageOptions:
    """How a stage runs; nothing here changes a byte of its output.

    Attributes:
        num_workers: actors; 0 asks for as many as fit the cluster, also when it grows.
        cpus_per_worker: CPU cores, and threads, of one worker.
        gpus_per_worker: GPUs of one worker, fractions allowed.
        in_flight: units a worker holds at once: one computing, the others being fetched or published.
        max_failures: failures after which a unit is quarantined whole.
    """

    num_workers: int = 0
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    in_flight: int = 3
    max_failures: int = 3


@dataclass(frozen=True)
class StageResult:
    """What a stage did.

    Attributes:
        description: the content of dataset.json.
        committed, resumed: shards committed by this run, and found committed by earlier ones.
        samples: samples committed by this run.
        seconds: duration of this run's work, from the first worker that was ready.
        startup_seconds: what passed before that (processes, libraries, weights).
        failed_shards: shards quarantined whole.
    """

    description: dict[str, Any]
    committed: int
    resumed: int
    samples: int
    seconds: float
    startup_seconds: float
    failed_shards: Sequence[str]


def run_stage(
    processor: Processor[UnitT],
    units: Sequence[UnitT],
    output: Dataset,
    *,
    name: str,
    kind: str,
    parent: Mapping[str, Any] | None = None,
    options: StageOptions | None = None,
) -> StageResult:
    """Run ``processor`` over ``units`` into ``output`` and complete the data set. Ray must be connected.

    Units whose manifest is already there are not done again. The same units, processor and input give the same shards whatever the
    options. ``name`` is shown beside the progress bar, ``kind`` and ``parent`` go to dataset.json.

    Raises:
        StageError: a fatal error, or the output holds other work.
        Interrupted: SIGTERM or SIGINT; everything in hand was committed.
        StoreError: the output cannot be written, or ignores conditional PUTs.
    """
    options = options or StageOptions()
    require_conditional_put(output.store)
    mark = fingerprint({"config": processor.describe(), "units": [(unit.name, unit.num_samples) for unit in units], "parent": parent})
    committed = set(output.names())
    _refuse_other_work(output, committed, units, mark)
    todo = [unit for unit in units if unit.name not in committed]
    started = time.perf_counter()
    samples, ready, pulse = 0, started, Pulse(name, units, committed)
    # the attempt lives until dataset.json is written: reading many manifests takes a while
    with attempting(output.store, mark, log.warning, pulse.tally) if todo else nullcontext() as attempt:
        if attempt is not None:
            samples, ready = _work(processor, units, todo, output, attempt, name, mark, options, pulse)
        finished = time.perf_counter()
        manifests = output.manifests()
        _require_own_work(output, manifests, mark)
        _require_data(output, manifests)
        lineage = {"parent": parent, "config": processor.describe(), "fingerprint": mark}
        description = output.finish(kind, lineage, manifests)
    failed = [manifest.shard for manifest in manifests if manifest.failure]
    return StageResult(description, len(todo), len(units) - len(todo), samples, finished - ready, ready - started, failed)


def _work(
    processor: Processor[UnitT],
    units: Sequence[UnitT],
    todo: list[UnitT],
    output: Dataset,
    attempt: Attempt,
    name: str,
    mark: str,
    options: StageOptions,
    pulse: Pulse,
) -> tuple[int, float]:
    """Commit what is left to do. Returns how many samples this attempt committed itself, and when its first worker was ready."""
    samples, begun = 0, {unit.name for unit in units} - {unit.name for unit in todo}
    with Progress(name, units, begun) as progress:
        # attempts that overlap begin at opposite ends, so that they meet in the middle rather than do the same shards side by side
        order = todo if attempt.number % 2 else todo[::-1]
        make_worker, give_up = _worker_factory(processor, output, attempt, mark, options), _giver_up(output, attempt, mark)
        metrics = StageMetrics(name, attempt, len(todo))
        crew, watcher = RayCrew(make_worker, lambda: _fitting_workers(options)), Watchers([progress, pulse, metrics])
        limits = {"in_flight": options.in_flight, "max_failures": options.max_failures}
        scheduler = Scheduler(crew, order, give_up, attempt=attempt, watcher=watcher, **limits)
        with metrics, about(run=attempt.run, attempt=attempt.number), draining(scheduler.stop):
            for manifest in scheduler.run(options.num_workers):
                samples += manifest.samples if (manifest.run, manifest.attempt) == (attempt.run, attempt.number) else 0
    return samples, scheduler.ready_at or time.perf_counter()


def _worker_factory(processor: Processor[Any], output: Dataset, attempt: Attempt, mark: str, options: StageOptions) -> Callable[[], Any]:
    """Makes actors of the stage; each call starts one."""
    actor = ray.remote(Worker).options(
        num_cpus=options.cpus_per_worker,
        num_gpus=options.gpus_per_worker,
        max_concurrency=options.in_flight + 1,
        max_restarts=0,  # the scheduler replaces a dead worker itself, so that it knows what was in its hands
    )
    shared = ray.put(processor)
    return lambda: actor.remote(shared, output.url, output.suffix, attempt, mark, options.cpus_per_worker)


def _giver_up(output: Dataset, attempt: Attempt, mark: str) -> Callable[[Unit, Sequence[str]], Manifest]:
    """Commits a shard that cannot be done as one ledger row that stands for all its samples."""

    def give_up(unit: Unit, errors: Sequence[str]) -> Manifest:
        evidence = " | ".join(dict.fromkeys(errors))[:2000]
        row = Rejected(unit.name, "failed-shard", evidence, 0, None, max(unit.num_samples, 1))
        data = ShardData(None, 0, Labels(), [row], failure=evidence)
        return output.commit(unit.name, data, fingerprint=mark, attempt=attempt, seconds={})

    return give_up


def _fitting_workers(options: StageOptions) -> int:
    """How many workers the cluster's resources hold."""
    held = resources()
    fits = [held.get("CPU", 0.0) / options.cpus_per_worker] if options.cpus_per_worker else []
    fits += [held.get("GPU", 0.0) / options.gpus_per_worker] if options.gpus_per_worker else []
    return int(min(fits, default=1))


def _refuse_other_work(output: Dataset, committed: set[str], units: Sequence[Unit], mark: str) -> None:
    """Raise StageError when the output already holds shards of another input or configuration."""
    unknown = committed - {unit.name for unit in units}
    if unknown:
        raise StageError(f"{output.url} holds shards that are not of this input ({sorted(unknown)[:3]} ...): choose another output")
    _require_own_work(output, output.manifests(sorted(committed)[:1]), mark)


def _require_own_work(output: Dataset, manifests: Sequence[Manifest], mark: str) -> None:
    other = [manifest.shard for manifest in manifests if manifest.fingerprint != mark]
    if other:
        raise StageError(
            f"{output.url} holds shards of another run ({other[:3]}: other input, weights, seed or options): choose another output, "
            "or repeat the run with the settings it was begun with"
        )


def _require_data(output: Dataset, manifests: Sequence[Manifest]) -> None:
    """Raise StageError when the data of a committed shard is gone or cut short, by one listing; ``facemae verify`` reads it too."""
    sizes = {stored.key: stored.size for stored in output.store.list("shards/")}
    for manifest in manifests:
        if manifest.file is not None and sizes.get(manifest.file) != manifest.num_bytes:
            held = f"has {sizes[manifest.file]} bytes" if manifest.file in sizes else "is gone"
            raise StageError(
                f"{output.url}/{manifest.file} {held}, its manifest says {manifest.num_bytes}: it was changed after its commit. Delete "
                f"manifests/{manifest.shard}.json and the object and run the same command again; facemae verify finds what else was changed"
            )


@contextmanager
def draining(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT ask the stage to finish what is in hand; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread: a job that runs elsewhere is stopped by its owner
        return

    def handle(number: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
