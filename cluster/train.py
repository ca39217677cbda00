"""Distributed training: Ray Train places the workers, DeepSpeed runs the step (cluster/trainer.py), the store keeps it.

    <run>/checkpoints/    see cluster/checkpoint.py
    <run>/keys/           which samples every step consumed, see cluster/key_log.py
    <run>/tensorboard/    event files
    <run>/grids/          originals | what the network sees | reconstructions, when asked for
    <run>/attempts/       who trains, and how far they are, see cluster/training_pulse.py
    <run>/weights/        model.safetensors and config.json: all that generation reads
    <run>/run.json        config, data lineage and metrics; written last: training is complete

This module stays light (no torch): it is what the driver and the small progress actor import.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from typing import Any

import ray
from tqdm import tqdm

from cluster.log import is_json
from cluster.metrics import TrainingMetrics
from cluster.scheduler import Interrupted
from cluster.stage import draining
from cluster.store import NotFound, Store, open_store, require_conditional_put
from cluster.train_job import TrainError, TrainJob
from cluster.training_pulse import TrainingPulse, recorded

log = logging.getLogger(__name__)


class Board:
    """Where workers and driver meet: an actor that holds the last progress, the reason to give up, and the wish to stop."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}
        self._fatal = ""
        self._stop = False

    def report(self, progress: dict[str, Any]) -> bool:
        """Take rank 0's progress. Returns whether the user asked to stop."""
        self._progress = progress
        return self._stop

    def read(self) -> dict[str, Any]:
        """The last progress."""
        return self._progress

    def fail(self, reason: str) -> None:
        """Record an error that trying again cannot help; the first one counts."""
        self._fatal = self._fatal or reason

    def failure(self) -> str:
        """That error, or an empty string."""
        return self._fatal

    def stop(self) -> None:
        """Ask the workers to write a checkpoint and end."""
        self._stop = True


def train(job: TrainJob) -> dict[str, Any]:
    """Run a training job, from its newest checkpoint if there is one. Ray must be connected.

    Returns:
        The content of run.json.

    Raises:
        TrainError: the output holds another training, a worker met an error that trying again cannot help, or too many failures.
        Interrupted: SIGTERM or SIGINT; there is a checkpoint to go on from.
    """
    store = open_store(job.output)
    finished = finished_run(store, job)
    if finished is not None:
        return finished
    require_conditional_put(store)
    require_own_checkpoints(store, job)
    with recorded(store, job) as pulse:
        return _attempt(store, job, pulse)


def _attempt(store: Store, job: TrainJob, pulse: TrainingPulse) -> dict[str, Any]:
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    stop = threading.Event()
    _tell_of_missing_resources(job)
    group: Future[None] = Future()
    try:
        with draining(stop):
            # Ray Train runs in a thread of its own: in the main one it would take the signals for itself
            threading.Thread(target=_run_group, args=(job, board, group), daemon=True).start()
            progress = _show(board, job, stop, group, pulse)
        group.result()
    finally:
        failure = ray.get(board.failure.remote())
        ray.kill(board)
    if failure:
        raise TrainError(failure)
    finished = finished_run(store, job)
    if finished is None:  # the workers ended as they were asked to
        raise Interrupted(f"stopped at step {progress.get('step')} of {job.steps}; run the same command to go on")
    return finished


def _tell_of_missing_resources(job: TrainJob) -> None:
    """Say what training waits for where the cluster does not hold it; an autoscaler may bring it."""
    need = {"CPU": job.options.num_workers * job.options.cpus_per_worker, "GPU": job.options.num_workers * job.options.use_gpu}
    have = ray.cluster_resources()
    if any(have.get(name, 0) < amount for name, amount in need.items()):
        held = ", ".join(f"{have.get(name, 0):g} {name}s" for name in need)
        print(f"train: waiting for {need['CPU']} CPUs and {need['GPU']} GPUs; the cluster has {held}", file=sys.stderr)


def _run_group(job: TrainJob, board: Any, done: Future[None]) -> None:
    """Run the workers to their end, and say through ``done`` how it was."""
    try:
        _fit(job, board)
        done.set_result(None)
    except BaseException as error:
        done.set_exception(error)


def _fit(job: TrainJob, board: Any) -> None:
    """One Ray Train run; a dead worker restarts the group, which goes on from the store."""
    defaults = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a busy machine imports torch slowly
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late the end of training is noticed
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    if len(ray.nodes()) == 1:  # a machine that is preempted takes the driver with it
        defaults["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # Ray's watcher of leaked placement groups asks its dashboard every second, and complains where there is none; a driver that
            # ends gives its placement groups back anyway
            return [each for each in super()._create_default_callbacks() if type(each).__name__ != "PlacementGroupCleanerCallback"]

    options = job.options
    resources = {"CPU": options.cpus_per_worker, **({"GPU": 1} if options.use_gpu else {})}
    with tempfile.TemporaryDirectory(prefix="facemae-train-") as scratch:
        trainer = Trainer(
            _work,
            train_loop_config={"job": job, "board": board},
            torch_config=TorchConfig(backend="nccl" if options.use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=options.use_gpu, resources_per_worker=resources),
            run_config=RunConfig(
                storage_path=scratch,  # Ray's own results; ours go to the store
                failure_config=FailureConfig(max_failures=options.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            reason = ray.get(board.failure.remote()) or str(error).strip().splitlines()[-1]
            raise TrainError(reason) from None


def _work(config: Mapping[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    from cluster.trainer import work

    work(config["job"], config["board"])


def finished_run(store: Store, job: TrainJob) -> dict[str, Any] | None:
    """The run.json of this very training, or None. Raises TrainError when it is of another."""
    try:
        content = json.loads(store.get("run.json"))
    except NotFound:
        return None
    _require_same(content.get("config"), job.config, f"{store.url} holds a finished training")
    return content


def require_own_checkpoints(store: Store, job: TrainJob) -> None:
    """Raise TrainError where the newest whole checkpoint at the output is of other settings."""
    from cluster.checkpoint import CheckpointError, Checkpoints

    checkpoints = Checkpoints(store)
    for step in reversed(checkpoints.steps()):
        try:
            content = checkpoints.describe(step)
        except CheckpointError:
            continue  # the workers pass over it too
        _require_same(content.get("config"), job.config, f"{store.url} holds checkpoints")
        return


def _require_same(found: Any, config: Mapping[str, Any], what: str) -> None:
    if found == config:
        return
    theirs = found if isinstance(found, dict) else {}
    names = [name for name in sorted({*theirs, *config}) if theirs.get(name) != config.get(name)]
    changes = [f"{name}: {theirs.get(name)!r} there, {config.get(name)!r} now" for name in names]
    raise TrainError(f"{what} of other settings ({'; '.join(changes)}): repeat them, or choose another output")


def _show(board: Any, job: TrainJob, stop: threading.Event, group: Future[None], pulse: TrainingPulse) -> dict[str, Any]:
    """A progress line on the driver's terminal, and the tally, until the group has ended; brings a stop to the workers. Returns the last
    progress."""
    progress: dict[str, Any] = {}
    interval = 0.5 if sys.stderr.isatty() else 5.0
    total, lines = job.plan.samples_before(job.steps), is_json()
    bar = tqdm(desc=job.label, total=total, unit=" images", mininterval=interval, file=sys.stderr, disable=lines)
    with bar, TrainingMetrics(job.label, pulse.attempt, job.steps) as metrics:
        running, told, begun = True, False, False
        while running:
            running = not wait([group], 0.3).done
            if stop.is_set() and not told:
                board.stop.remote()
                told = True
            reported, progress = progress.get("step"), ray.get(board.read.remote())
            pulse.report(progress)
            metrics.report(progress)
            if lines and progress.get("step") != reported:
                log.info("%s: step %d of %d, %s", job.label, progress["step"], job.steps, _terms(progress["metrics"]))
            if progress and not begun:  # neither start-up nor what an earlier run did counts in the rate
                begun = True
                bar.initial = bar.n = bar.last_print_n = progress["first_sample"]
                bar.start_t = bar.last_print_t = time.time()
            if progress.get("samples", bar.n) != bar.n:
                bar.set_postfix_str(f"step {progress['step']}/{job.steps}, {_terms(progress['metrics'])}", refresh=False)
                bar.update(progress["samples"] - bar.n)
    return progress


def _terms(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
