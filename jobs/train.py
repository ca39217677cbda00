"""``facemae train``: FaceMAE on a data set, by Ray Train and DeepSpeed."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import timm

from cluster.dataset import Dataset
from cluster.order import require_tuples
from cluster.picture import SIZE
from cluster.recognizer_file import Recognizer, open_recognizer
from cluster.session import session
from cluster.store import read_url
from cluster.stream import require_embeddings
from cluster.train import train
from cluster.train_job import Recipe, TrainJob, TrainOptions, plan_training
from facemae.masking import count_visible
from facemae.training import LossConfig
from jobs.command import RayConfig, main_of


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RayConfig):
    """Train FaceMAE: reconstruct masked faces so that the distances between people, in a recogniser's eyes, stay the same.

    Reads: a data set made by ingest, and its embeddings by the recogniser (facemae embed) unless --loss mse.
    Writes: OUTPUT/weights (safetensors), run.json, checkpoints, TensorBoard files and pictures. A run that was stopped goes on where it
    was, on the same or another number of workers: run the same command again.
    Next: facemae protect.
    """

    data: str
    """Root of the data set to train on."""
    output: str
    """Root of the run: a folder or s3://bucket/prefix."""
    recognizer: str | None = None
    """ONNX file of the recogniser inside the loss, a path or s3://; not needed with --loss mse."""
    recognizer_mean: tuple[float, float, float] | None = None
    """Mean of value/255 for each colour, where there is no FILE.json beside it."""
    recognizer_std: tuple[float, float, float] | None = None
    """Standard deviation of value/255 for each colour, likewise."""
    deepspeed: str | None = None
    """DeepSpeed JSON (ZeRO stage, bf16, offload_optimizer, gradient_clipping); by default ZeRO 1, clipping at 1, bf16 on GPUs."""
    loss: Literal["irm", "mse", "irm+pixel", "irm+instance"] = "irm"
    """irm: instance relation matching (FaceMAE); mse: pixels alone (MAE); the others add a term to irm."""
    relation_weight: float | None = None
    """Weight of the relation term; None: the preset's."""
    pixel_weight: float | None = None
    """Weight of the pixel term, likewise."""
    instance_weight: float | None = None
    """Weight of the instance term, likewise; a large one brings each picture's identity back."""
    pixel_kind: Literal["mse", "l1", "ssim", "perceptual"] = "mse"
    """Kind of the pixel term."""
    distance: Literal["cosine", "euclidean"] = "cosine"
    """Distance in the relation graph."""
    layers: tuple[str, ...] = ()
    """Further layers of the recogniser whose relations count too."""
    architecture: str = "facemae_small_patch8_112"
    """facemae_{tiny,small,base,large}_patch{8,16}_112."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the network."""
    batch_size: int = 256
    """Images of a global batch, over all workers: a multiple of lanes x images per identity."""
    images_per_identity: int = 4
    """Images of one identity that stay together in a batch, so that the relation graph has genuine pairs."""
    epochs: float = 100.0
    """Passes over the data."""
    samples: int | None = None
    """Images to see in all, in place of epochs; rounded up to whole steps."""
    lr: float = 1.5e-4
    """Peak learning rate at a batch of 256; scaled with the batch."""
    min_lr: float = 0.0
    """Where the cosine ends, likewise scaled."""
    warmup: float = 0.05
    """Share of training over which the learning rate rises."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; none on biases and norms."""
    seed: int = 0
    """Of the initial weights, the masks and the order."""
    lanes: int = 4
    """Streams of an epoch; the number of workers must divide it. More workers than this need more lanes from the start."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a killed run loses the steps since the last one."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep."""
    grid_every: int = 500
    """Steps between pictures of reconstructions, 0 for none. They show originals: the run's folder is then as private as the data."""
    log_every: int = 10
    """Steps between metrics."""
    log_keys: bool = True
    """Write down in OUTPUT/keys which images every step saw, by key, so that facemae verify can show that none was repeated or skipped."""
    max_failures: int = 3
    """Restarts after a dead worker before training is given up."""

    def check(self) -> None:
        """See Config."""
        count_visible(_num_patches(self.architecture), self.mask_ratio)
        require_tuples(self.batch_size, self.images_per_identity, self.lanes)
        check_length(self)
        worker_gpu(self)


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, and return the summary that is printed."""
    started = time.perf_counter()
    data, recipe = Dataset(config.data), _recipe(config)
    recognizer = _recognizer(config, data) if recipe.loss.needs_recognizer else None
    with session(config.address):
        job = plan_training(data, config.output, recipe, recognizer, _options(config))
        seen, stage = job.plan.samples_before(job.steps), job.deepspeed.get("zero_optimization", {}).get("stage", 0)
        print(
            f"{job.plan.num_samples} images, {job.plan.steps_per_epoch} steps an epoch, {job.steps} in all = {seen} images seen; "
            f"{job.options.num_workers} workers, ZeRO {stage}; writing {job.output}"
        )
        result = train(job)
    return _summary(config, job, result, time.perf_counter() - started)


def _recipe(config: TrainConfig) -> Recipe:
    """What is trained, checked where that is cheap."""
    names = ("relation", "pixel", "instance")
    weights = {name: getattr(config, f"{name}_weight") for name in names}
    changes = {name: weight for name, weight in weights.items() if weight is not None}
    loss = LossConfig.preset(config.loss, **changes, pixel_kind=config.pixel_kind, distance=config.distance, layers=config.layers)
    count_visible(_num_patches(config.architecture), config.mask_ratio)
    samples = config.samples or round(config.epochs * int(Dataset(config.data).description()["samples"]))
    if samples < 1:
        raise ValueError(f"--epochs {config.epochs} of this data set is less than one image")
    same = ("architecture", "mask_ratio", "batch_size", "images_per_identity", "lanes", "lr", "min_lr", "warmup", "weight_decay", "seed")
    return Recipe(loss=loss, samples=samples, **{name: getattr(config, name) for name in same})


def check_length(config: Any) -> None:
    """Raise ValueError for a training of no length, or with a learning rate or warm-up that cannot be."""
    for name in ("epochs", "samples", "lr"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: give more than 0")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"warmup is {config.warmup}: give a share of the training, 0 to 1")


def _num_patches(architecture: str) -> int:
    return (SIZE // int(_known(architecture).split("_patch")[1].split("_")[0])) ** 2


def _known(architecture: str) -> str:
    known = timm.list_models("facemae_*")
    if architecture not in known:
        raise ValueError(f"unknown architecture {architecture!r}: choose one of {', '.join(known)}")
    return architecture


def _recognizer(config: TrainConfig, data: Dataset) -> Recognizer:
    """The loss's recogniser, by which the data set must have been embedded."""
    if config.recognizer is None:
        raise ValueError(f"--loss {config.loss} looks through a recogniser: give --recognizer FILE.onnx, or train with --loss mse")
    recognizer = open_recognizer(config.recognizer, config.recognizer_mean, config.recognizer_std)
    command = f"facemae embed --input {config.data} --recognizer {config.recognizer}"
    for flag, values in (("mean", config.recognizer_mean), ("std", config.recognizer_std)):
        if values is not None:
            command += f" --recognizer-{flag} {' '.join(map(str, values))}"
    require_embeddings(data, recognizer.name, recognizer.sha256, command)
    return recognizer


def _options(config: TrainConfig) -> TrainOptions:
    """Where it runs. Ray must be connected."""
    same = ("cpus_per_worker", "checkpoint_every", "keep_checkpoints", "grid_every", "log_every", "log_keys", "max_failures")
    return TrainOptions(
        num_workers=config.num_workers or fitting_workers(config, config.lanes),
        use_gpu=worker_gpu(config),
        deepspeed=read_deepspeed(config.deepspeed) if config.deepspeed else None,
        **{name: getattr(config, name) for name in same},
    )


def worker_gpu(config: RayConfig) -> bool:
    """Whether a training worker has its GPU. Raises ValueError for a share of one."""
    if config.gpus_per_worker not in (0, 1):
        raise ValueError(f"--gpus-per-worker {config.gpus_per_worker}: a training worker has one GPU or none")
    return config.gpus_per_worker == 1


def fitting_workers(config: RayConfig, lanes: int) -> int:
    """The most workers that the cluster holds and that divide the lanes. Ray must be connected."""
    resources = ray.cluster_resources()
    fits = int(resources.get("CPU", 0) / max(config.cpus_per_worker, 1))
    if config.gpus_per_worker:
        fits = min(fits, int(resources.get("GPU", 0)))
    return max((n for n in range(1, lanes + 1) if lanes % n == 0 and n <= fits), default=1)


def read_deepspeed(path: str) -> Mapping[str, Any]:
    """A DeepSpeed JSON, local or s3://. Raises ValueError where it is none."""
    try:
        content = json.loads(read_url(path))
    except ValueError as error:
        raise ValueError(f"{path} is no DeepSpeed JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no DeepSpeed JSON: it must be an object")
    return content


def _summary(config: TrainConfig, job: TrainJob, result: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Print what was trained and where it is. Returns the same, and what to run next."""
    terms = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items() if name != "lr")
    print(f"{result['samples']} images in {result['steps']} steps; {terms}")
    print(f"written: {job.output}")
    next_step = f"facemae protect --input {config.data} --output PROTECTED --weights {config.output}"
    keys = ("steps", "samples", "epochs", "metrics", "weights")
    return {"url": job.output, **{key: result[key] for key in keys}, "seconds": seconds, "next": next_step}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(TrainConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
