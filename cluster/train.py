"""Distributed training of FaceMAE: Ray Train places the workers, DeepSpeed runs the step (cluster/train_worker.py), the store keeps it.

    <run>/checkpoints/    see cluster/checkpoint.py
    <run>/tensorboard/    event files
    <run>/grids/          originals | what the network sees | reconstructions, when asked for
    <run>/weights/        model.safetensors and config.json: all that generation reads
    <run>/run.json        config, data lineage and metrics; written last: training is complete

This module stays light (no torch): it is what the driver and the small progress actor import.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray
from tqdm import tqdm

from cluster.order import Plan, read_counts
from cluster.scheduler import Interrupted, StageError
from cluster.stage import _draining
from cluster.store import NotFound, Store, open_store, require_conditional_put

if TYPE_CHECKING:
    from cluster.dataset import Dataset
    from facemae.recognizer.onnx import OnnxRecognizer
    from facemae.training import LossConfig


class TrainError(StageError):
    """Training that cannot go on; the message names the reason and the remedy."""


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: everything that decides the weights but the data and the recogniser.

    Attributes:
        architecture: a facemae_* model of timm.
        loss: terms and weights.
        mask_ratio: hidden share of the patches.
        batch_size: samples of a global batch, over all workers.
        images_per_identity: samples of one identity that stay together in a batch.
        lanes: streams of an epoch; the number of workers must divide it.
        samples: how many samples training sees in all.
        lr: peak learning rate at a batch of 256; scaled with the batch (blr, arXiv 2111.06377).
        min_lr: where the cosine ends, likewise scaled.
        warmup: share of the samples over which the rate rises.
        weight_decay: AdamW's, none on biases and norms.
        seed: of initial weights, masks and order.
    """

    architecture: str
    loss: LossConfig
    mask_ratio: float = 0.75
    batch_size: int = 256
    images_per_identity: int = 4
    lanes: int = 4
    samples: int = 1_000_000
    lr: float = 1.5e-4
    min_lr: float = 0.0
    warmup: float = 0.05
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class TrainOptions:
    """Where and how training runs; nothing here changes which samples a step sees.

    Attributes:
        num_workers: workers, each with one GPU or none.
        cpus_per_worker: CPU cores, and threads, of one worker.
        use_gpu: one GPU a worker.
        deepspeed: the user's DeepSpeed JSON, or None for ours.
        checkpoint_every: steps between checkpoints; there is always one at the end.
        keep_checkpoints: how many of the newest are kept.
        grid_every: steps between pictures of reconstructions, 0 for none. They show originals.
        log_every: steps between metrics.
        max_failures: restarts of the worker group before training is given up.
        stop_at_step: end this run there with a checkpoint; the next run goes on.
    """

    num_workers: int = 1
    cpus_per_worker: int = 1
    use_gpu: bool = False
    deepspeed: Mapping[str, Any] | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    grid_every: int = 500
    log_every: int = 10
    max_failures: int = 3
    stop_at_step: int | None = None


@dataclass(frozen=True)
class TrainJob:
    """What the driver hands to every worker.

    Attributes:
        data, output: URLs, absolute.
        plan: the order of the samples.
        steps: global steps of the whole training.
        config: what decides the trained weights, flat and JSON-able; a run is continued only with the same. Precision, ZeRO stage and
            number of workers are left out: a run may move to another machine.
        deepspeed: the merged DeepSpeed configuration.
    """

    data: str
    output: str
    plan: Plan
    steps: int
    recipe: Recipe
    options: TrainOptions
    recognizer: OnnxRecognizer | None
    config: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    parent: Mapping[str, Any]


def merge_deepspeed(user: Mapping[str, Any] | None, *, batch_size: int, world_size: int, use_gpu: bool) -> dict[str, Any]:
    """The user's DeepSpeed configuration, or ours (ZeRO 1, gradient norm clipped at 1, bf16 on GPUs), with the batch filled in.

    Raises:
        TrainError: a key that belongs to the train config, a batch size other than its, or a mode that checkpoints cannot hold.
    """
    ours = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": use_gpu}, "gradient_clipping": 1.0}
    config = json.loads(json.dumps(ours if user is None else dict(user)))  # a copy
    for key, flags in {"optimizer": "--lr, --weight-decay", "scheduler": "--lr, --min-lr, --warmup"}.items():
        if key in config:
            raise TrainError(f"the DeepSpeed configuration has {key!r}: remove it, it is set by the train config ({flags})")
    micro = batch_size // world_size
    expected = {"train_batch_size": batch_size, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": 1}
    for key, value in expected.items():
        if config.get(key, "auto") not in ("auto", value):
            why = "the relation graph needs the whole batch in one step" if key.startswith("grad") else f"--batch-size is {batch_size}"
            raise TrainError(f"the DeepSpeed configuration has {key} {config[key]}, it must be {value} or absent: {why}")
    zero = config.get("zero_optimization", {})
    devices = [zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")]
    refused = {
        "fp16": (config.get("fp16", {}).get("enabled") is True, "use bf16"),
        "bf16 without ZeRO": (config.get("bf16", {}).get("enabled") is True and not zero.get("stage"), "set zero_optimization.stage to 1"),
        "offload_param": (devices[1] != "none", "remove it: these models fit"),
        "offload_optimizer to nvme": (devices[0] == "nvme", 'set its device to "cpu"'),
    }
    for name, (found, remedy) in refused.items():
        if found:
            raise TrainError(f"the DeepSpeed configuration asks for {name}, which is not supported: {remedy}")
    # the optimiser is torch's AdamW also when offloaded, so DeepSpeed must not insist on its own, which it would compile at start
    return {**config, **expected, "zero_force_ds_cpu_optimizer": False, "steps_per_print": sys.maxsize}


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


def plan_training(data: Dataset, output: str, recipe: Recipe, recognizer: OnnxRecognizer | None, options: TrainOptions) -> TrainJob:
    """Everything a training needs, worked out once on the driver.

    Args:
        recognizer: the loss's; None where no term needs one.

    Raises:
        TrainError, OrderError, StoreError: what cannot be trained so, before any worker starts.
    """
    content = data.description()
    plan = Plan(read_counts(data), recipe.batch_size, recipe.images_per_identity, recipe.lanes, recipe.seed)
    plan.lanes_of(0, options.num_workers)
    deepspeed = merge_deepspeed(options.deepspeed, batch_size=recipe.batch_size, world_size=options.num_workers, use_gpu=options.use_gpu)
    parent = {"url": data.url, "fingerprint": content["lineage"]["fingerprint"], "samples": content["samples"]}
    config = {
        **{name: value for name, value in vars(recipe).items() if name != "loss"},
        **{f"loss.{name}": value for name, value in asdict(recipe.loss).items()},
        "data": parent["fingerprint"],
        "recognizer": recognizer.describe()["sha256"] if recognizer else None,
        "gradient_clipping": deepspeed.get("gradient_clipping", 0.0),
    }
    steps = max(1, math.ceil(recipe.samples / plan.num_samples * plan.steps_per_epoch))
    config = json.loads(json.dumps(config))
    return TrainJob(data.url, open_store(output).url, plan, steps, recipe, options, recognizer, config, deepspeed, parent)


def train(job: TrainJob) -> dict[str, Any]:
    """Run a training job, from its newest checkpoint if there is one. Ray must be connected.

    Returns:
        The content of run.json, or {"stopped": step} when ``stop_at_step`` ended the run before.

    Raises:
        TrainError: the output holds another training, a worker met an error that trying again cannot help, or too many failures.
        Interrupted: SIGTERM or SIGINT; there is a checkpoint to go on from.
    """
    store = open_store(job.output)
    finished = _finished(store, job)
    if finished is not None:
        return finished
    require_conditional_put(store)
    _require_own_checkpoints(store, job)
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    stop = threading.Event()
    # Ray Train runs in a thread of its own: in the main one it would take the signals for itself
    with _draining(stop), ThreadPoolExecutor(1) as pool:
        group = pool.submit(_run_group, job, board)
        progress = _show(board, job, stop, group)
    try:
        group.result()
    finally:
        failure = ray.get(board.failure.remote())
        ray.kill(board)
    if failure:
        raise TrainError(failure)
    finished = _finished(store, job)
    if finished is None and stop.is_set():
        raise Interrupted(f"stopped at step {progress.get('step')} of {job.steps}; run the same command to go on")
    return {"stopped": progress.get("step")} if finished is None else finished


def _run_group(job: TrainJob, board: Any) -> None:
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
    from cluster.train_worker import work

    work(config["job"], config["board"])


def _finished(store: Store, job: TrainJob) -> dict[str, Any] | None:
    """The run.json of this very training, or None. Raises TrainError when it is of another."""
    try:
        content = json.loads(store.get("run.json"))
    except NotFound:
        return None
    _require_same(content.get("config"), job.config, f"{store.url} holds a finished training")
    return content


def _require_own_checkpoints(store: Store, job: TrainJob) -> None:
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


def _show(board: Any, job: TrainJob, stop: threading.Event, group: Future[None]) -> dict[str, Any]:
    """A progress line on the driver's terminal until the group has ended; brings a stop to the workers. Returns the last progress."""
    progress: dict[str, Any] = {}
    interval = 0.5 if sys.stderr.isatty() else 5.0
    with tqdm(desc="train", total=job.plan.samples_before(job.steps), unit=" images", mininterval=interval, file=sys.stderr) as bar:
        running, told, begun = True, False, False
        while running:
            running = not wait([group], 0.3).done
            if stop.is_set() and not told:
                board.stop.remote()
                told = True
            progress = ray.get(board.read.remote())
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
