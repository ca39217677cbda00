"""What a training is: options, DeepSpeed configuration, and the job that the driver hands to its workers; FaceMAE's recipe and job.

This module stays light (no torch), for the sake of the small processes that import it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cluster.dataset import Dataset
from cluster.order import Plan, read_counts
from cluster.scheduler import StageError
from cluster.store import open_store

if TYPE_CHECKING:
    from cluster.recognizer_file import Recognizer
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
        log_keys: write down which samples every step consumed (cluster/key_log.py).
        max_failures: restarts of the worker group before training is given up.
    """

    num_workers: int = 1
    cpus_per_worker: int = 1
    use_gpu: bool = False
    deepspeed: Mapping[str, Any] | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    grid_every: int = 500
    log_every: int = 10
    log_keys: bool = True
    max_failures: int = 3


@dataclass(frozen=True)
class TrainJob:
    """What the driver hands to every worker, whatever is trained.

    Attributes:
        data, output: URLs, absolute.
        plan: the order of the samples.
        steps: global steps of the whole training.
        config: what decides the trained weights, flat and JSON-able; a run is continued only with the same. Precision, ZeRO stage and
            number of workers are left out: a run may move to another machine.
        deepspeed: the merged DeepSpeed configuration.
        parent: the data set: url, fingerprint, samples.
    """

    trainer: ClassVar[str]
    """module:class of the ``cluster.trainer.Trainer`` that runs it."""
    label: ClassVar[str]
    """What the progress line calls it."""
    data: str
    output: str
    plan: Plan
    steps: int
    options: TrainOptions
    config: Mapping[str, Any]
    deepspeed: Mapping[str, Any]
    parent: Mapping[str, Any]


@dataclass(frozen=True)
class FaceMaeJob(TrainJob):
    """A training of FaceMAE: its recipe, and the recogniser inside its loss, None where no term needs one."""

    trainer, label = "cluster.train_worker:FaceMaeTrainer", "train"
    recipe: Recipe
    recognizer: Recognizer | None


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


def plan_training(data: Dataset, output: str, recipe: Recipe, recognizer: Recognizer | None, options: TrainOptions) -> FaceMaeJob:
    """Everything a training of FaceMAE needs, worked out once on the driver.

    Args:
        recognizer: the loss's; None where no term needs one.

    Raises:
        TrainError, OrderError, StoreError: what cannot be trained so, before any worker starts.
    """
    plan = Plan(read_counts(data), recipe.batch_size, recipe.images_per_identity, recipe.lanes, recipe.seed)
    plan.lanes_of(0, options.num_workers)
    deepspeed = merge_deepspeed(options.deepspeed, batch_size=recipe.batch_size, world_size=options.num_workers, use_gpu=options.use_gpu)
    parent = lineage(data)
    config = {
        **{name: value for name, value in vars(recipe).items() if name != "loss"},
        **{f"loss.{name}": value for name, value in asdict(recipe.loss).items()},
        "data": parent["fingerprint"],
        "recognizer": recognizer.describe()["sha256"] if recognizer else None,
        "gradient_clipping": deepspeed.get("gradient_clipping", 0.0),
    }
    config = json.loads(json.dumps(config))
    steps = steps_for(plan, recipe.samples)
    return FaceMaeJob(data.url, open_store(output).url, plan, steps, options, config, deepspeed, parent, recipe, recognizer)


def lineage(data: Dataset) -> dict[str, Any]:
    """What a run says of its data set."""
    content = data.description()
    return {"url": data.url, "fingerprint": content["lineage"]["fingerprint"], "samples": content["samples"]}


def steps_for(plan: Plan, samples: int) -> int:
    """Global steps that see at least about this many samples."""
    return max(1, math.ceil(samples / plan.num_samples * plan.steps_per_epoch))
