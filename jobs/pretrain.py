"""``facemae pretrain``: a recogniser on a protected, or an original, data set, by Ray Train, DeepSpeed and Partial FC."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.dataset import Dataset
from cluster.inputs import require_apart
from cluster.order import require_tuples
from cluster.pretrain_job import PretrainJob, PretrainRecipe, count_classes, plan_pretraining
from cluster.recognizer_file import local_recognizer
from cluster.session import session
from cluster.shard import sha256_hex
from cluster.store import join_url
from cluster.train import train
from cluster.train_job import TrainOptions
from cluster.weights import local_weights
from facemae.recognizer.augment import AugmentConfig
from facemae.weights import WEIGHTS_FILE
from jobs.command import RayConfig, main_of
from jobs.train import check_length, fitting_workers, read_deepspeed, worker_gpu

if TYPE_CHECKING:
    from facemae.recognizer.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RayConfig):
    """Pretrain a face recogniser on the people of a data set, protected or not, straight from its shards.

    Reads: a data set made by ingest or protect.
    Writes: OUTPUT/weights (recognizer.onnx with recognizer.json beside it, and the same as safetensors), run.json, checkpoints and
    TensorBoard files. A run that was stopped goes on where it was, in mid-epoch, on the same or another number of workers.
    Next: facemae evaluate; or facemae embed, train, leakage with the ONNX file.
    """

    data: str
    """Root of the data set."""
    output: str
    """Root of the run: a folder or s3://bucket/prefix."""
    backbone: str | None = None
    """By default iresnet50. iresnet18, 34, 50 or 100, mobilefacenet, timm/NAME, or, small enough for two CPU cores,
    compact[-plain|residual|separable][-WIDTH]."""
    dim: int | None = None
    """Length of an embedding, by default 512."""
    init: str | None = None
    """Start from these weights instead of random ones: a pretraining run, its weights folder, or FILE.onnx (s3://, or a path on every
    worker). They bring backbone and length with them."""
    margin: Literal["cosface", "arcface", "adaface"] = "cosface"
    """Margin of the loss."""
    margin_value: float | None = None
    """How large; None: 0.4 for cosface and adaface, 0.5 for arcface. Small networks that see few people want less."""
    scale: float = 64.0
    """Factor on the cosines; small networks want less."""
    rate: float = 1.0
    """Partial FC: the share of the other people that a step looks at. 1 is the full softmax; 0.1 to 0.3 for a million people."""
    num_classes: int | None = None
    """The number of people, to be checked against the labels; None takes what is there."""
    flip: bool = True
    """Mirror pictures with probability 1/2."""
    crop: float = 0.0
    """Largest share of a side that a random crop cuts off."""
    erase: float = 0.0
    """Probability of erasing a random rectangle."""
    color: float = 0.0
    """Largest change of brightness, contrast and saturation."""
    batch_size: int = 128
    """Images of a global batch, over all workers: a multiple of lanes."""
    epochs: float = 20.0
    """Passes over the data."""
    samples: int | None = None
    """Images to see in all, in place of epochs; rounded up to whole steps."""
    lr: float = 0.1
    """Highest learning rate of SGD: 0.1 at a batch of 1024 for large networks, at 128 for compact ones."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Of SGD, on backbone and centres."""
    warmup: float = 0.05
    """Share of training over which the learning rate rises."""
    seed: int = 0
    """Of the network's start, the order, the augmentation and the choice of negatives."""
    lanes: int = 4
    """Streams of an epoch; the number of workers must divide it."""
    deepspeed: str | None = None
    """DeepSpeed JSON; by default ZeRO 1, gradients clipped at 5, autocast to bfloat16 on GPUs."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; a killed run loses the steps since the last one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    log_every: int = 10
    """Steps between metrics."""
    log_keys: bool = True
    """Write down in OUTPUT/keys which images every step saw, by key, for facemae verify."""
    max_failures: int = 3
    """Restarts after a dead worker before training is given up."""

    def check(self) -> None:
        """See Config."""
        require_tuples(self.batch_size, 1, self.lanes)
        check_length(self)
        worker_gpu(self)
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is {self.rate}: give a share of the people, above 0 to 1")


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train, and return the summary that is printed."""
    started = time.perf_counter()
    with session(config.address):
        job = prepare(config)
        recipe, seen = job.recipe, job.plan.samples_before(job.steps)
        print(
            f"{job.plan.num_samples} images of {recipe.num_classes} people, {job.plan.steps_per_epoch} steps an epoch, {job.steps} in all "
            f"= {seen} images seen; {recipe.backbone}, {recipe.margin}, {job.options.num_workers} workers; writing {job.output}"
        )
        result = train(job)
    return _summary(job, result, time.perf_counter() - started)


def prepare(config: PretrainConfig) -> PretrainJob:
    """Everything that can be checked before a worker starts. Ray must be connected where ``num_workers`` is 0."""
    require_apart(config.data, config.output)
    data = Dataset(config.data)
    samples = round(config.epochs * int(data.description()["samples"])) if config.samples is None else config.samples
    if samples < 1:
        raise ValueError(f"--epochs {config.epochs}, --samples {config.samples}: less than one image of this data set")
    same = ("margin", "margin_value", "scale", "rate", "batch_size", "lanes", "lr", "momentum", "weight_decay", "warmup", "seed")
    recipe = PretrainRecipe(
        **require_recipe(config),
        augment=AugmentConfig(flip=config.flip, crop=config.crop, erase=config.erase, color=config.color),
        num_classes=count_classes(data, config.num_classes),
        samples=samples,
        **{name: getattr(config, name) for name in same},
    )
    return plan_pretraining(data, config.output, recipe, _options(config))


def require_recipe(config: PretrainConfig) -> dict[str, Any]:
    """Check what of a recipe does not hang on the data, before any worker starts.

    Returns:
        The backbone's name and length, and where its first weights come from.

    Raises:
        ValueError, FileNotFoundError, StoreError: what cannot be trained.
    """
    import torch

    from facemae.recognizer.backbone import create_backbone
    from facemae.recognizer.margin import create_margin

    create_margin(config.margin, margin=config.margin_value, scale=config.scale)
    AugmentConfig(flip=config.flip, crop=config.crop, erase=config.erase, color=config.color)
    ranges = {"rate": (0, 1), "lr": (0, 1e3), "momentum": (-1, 1), "weight_decay": (-1, 1), "warmup": (-1, 1)}
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not (max(low, 0) <= value <= high and value > low):
            raise ValueError(f"--{name.replace('_', '-')} {value}: give a number {'above' if low == 0 else 'from'} 0, up to {high:g}")
    if config.seed < 0:
        raise ValueError(f"--seed {config.seed}: give 0 or more")
    start = _start(config)
    if config.init is None:
        with torch.device("meta"):  # weights are not drawn
            create_backbone(start["backbone"], start["dim"])
    return start


def _start(config: PretrainConfig) -> dict[str, Any]:
    if config.init is None:
        return {"backbone": config.backbone or "iresnet50", "dim": config.dim or 512}
    from facemae.recognizer.pretrained import load_backbone

    if config.init.endswith(".onnx"):
        with local_recognizer(config.init) as file:
            net, digest = load_backbone(file), sha256_hex(file.read_bytes())
        _require_exportable(net, config.init)
    else:
        with local_weights(config.init) as folder:
            net, digest = load_backbone(folder), sha256_hex((folder / WEIGHTS_FILE).read_bytes())
    for flag, given, brought in (("backbone", config.backbone, net.name), ("dim", config.dim, net.dim)):
        if given not in (None, brought):
            raise ValueError(f"--{flag} {given}, but {config.init} holds {brought}: leave --{flag} out, or give other first weights")
    return {"backbone": net.name, "dim": net.dim, "init": config.init, "init_sha256": digest}


def _require_exportable(net: Backbone, source: str) -> None:
    """Refuse now what could not be written at the end: some graphs compute shapes while they run, which torch's exporter cannot follow."""
    from facemae.recognizer.export import export_onnx

    try:
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(net, Path(folder) / "try.onnx")
    except Exception as error:  # the exporter raises whatever a graph leads it to
        raise ValueError(
            f"{source}: trains, but what comes of it could not be written as ONNX again ({type(error).__name__}): "
            "start from a safetensors folder of facemae pretrain, or from another file"
        ) from None


def _options(config: PretrainConfig) -> TrainOptions:
    same = ("cpus_per_worker", "checkpoint_every", "keep_checkpoints", "log_every", "log_keys", "max_failures")
    return TrainOptions(
        num_workers=config.num_workers or fitting_workers(config, config.lanes),
        use_gpu=worker_gpu(config),
        deepspeed=read_deepspeed(config.deepspeed) if config.deepspeed else None,
        grid_every=0,
        **{name: getattr(config, name) for name in same},
    )


def _summary(job: PretrainJob, result: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Print what was trained and where it is. Returns the same, and what to run next."""
    onnx = join_url(job.output, result["recognizer"]["file"])
    print(f"{result['samples']} images in {result['steps']} steps; loss {result['metrics']['loss']:.4g}")
    print(f"written: {onnx}")
    next_step = f"facemae evaluate --recognizer {onnx} --pairs PAIRS.txt --images FACES --output scores"
    keys = ("steps", "samples", "epochs", "metrics", "weights", "recognizer")
    return {"url": job.output, "onnx": onnx, **{key: result[key] for key in keys}, "seconds": seconds, "next": next_step}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(PretrainConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
