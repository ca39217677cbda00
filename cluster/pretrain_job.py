"""What the pretraining of a recogniser is: its recipe, and the job that the driver hands to its workers.

This module stays light (no torch), for the sake of the small processes that import it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.dataset import Dataset
from cluster.order import Plan, read_counts
from cluster.store import open_store
from cluster.train_job import TrainError, TrainJob, TrainOptions, lineage, merge_deepspeed, steps_for

if TYPE_CHECKING:
    from facemae.recognizer.augment import AugmentConfig


MOST_CLASSES_A_PERSON = 1000
"""Labels with wider gaps are a mistake: the centres would not fit a machine."""


@dataclass(frozen=True)
class PretrainRecipe:
    """What is trained and how: everything that decides the weights but the data.

    Attributes:
        backbone, dim: see ``facemae.recognizer.backbone.create_backbone``.
        init: weights to start from (``load_backbone``), or None for random ones.
        init_sha256: of that file.
        margin: cosface, arcface or adaface.
        margin_value, scale: of the margin; None takes the margin's own.
        rate: share of the other people's centres that take part in a step (Partial FC).
        augment: how far pictures are changed.
        num_classes: centres; labels are 0 .. num_classes - 1.
        batch_size: samples of a global batch, over all workers.
        lanes: streams of an epoch; the number of workers must divide it.
        samples: how many samples training sees in all.
        lr: highest learning rate of backbone and centres.
        momentum, weight_decay: of SGD, likewise.
        warmup: share of the steps over which the rate rises.
        seed: of initial weights and centres, order, augmentation and the choice of negatives.
    """

    backbone: str
    augment: AugmentConfig
    num_classes: int
    dim: int = 512
    init: str | None = None
    init_sha256: str | None = None
    margin: str = "cosface"
    margin_value: float | None = None
    scale: float | None = None
    rate: float = 1.0
    batch_size: int = 128
    lanes: int = 4
    samples: int = 1_000_000
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class PretrainJob(TrainJob):
    """A pretraining of a recogniser."""

    trainer, label = "cluster.pretrain_worker:RecognizerTrainer", "pretrain"
    recipe: PretrainRecipe


def plan_pretraining(data: Dataset, output: str, recipe: PretrainRecipe, options: TrainOptions) -> PretrainJob:
    """Everything a pretraining needs, worked out once on the driver.

    Raises:
        TrainError, OrderError, StoreError: what cannot be trained so, before any worker starts.
    """
    plan = Plan(read_counts(data), recipe.batch_size, images_per_identity=1, lanes=recipe.lanes, seed=recipe.seed)
    plan.lanes_of(0, options.num_workers)
    deepspeed = _deepspeed(recipe, options)
    config = {
        **{name: value for name, value in vars(recipe).items() if name not in ("augment", "init")},
        **{f"augment.{name}": value for name, value in asdict(recipe.augment).items()},
        "data": lineage(data)["fingerprint"],
        "gradient_clipping": deepspeed.get("gradient_clipping", 0.0),
    }
    config = json.loads(json.dumps(config))
    steps = steps_for(plan, recipe.samples)
    return PretrainJob(data.url, open_store(output).url, plan, steps, options, config, deepspeed, lineage(data), recipe)


def count_classes(data: Dataset, num_classes: int | None = None) -> int:
    """The number of class centres for a data set: one more than its largest label.

    Labels with gaps are allowed, and said: a centre without a picture is a negative for everybody else and costs its memory.

    Args:
        num_classes: what the user believes, to be checked; None takes what is there.

    Raises:
        TrainError: the data set holds another number, or has no identities.
    """
    data.description()  # or there is no data set
    labels = [manifest.identities for manifest in data.manifests() if manifest.identities.count]
    if not labels:
        raise TrainError(f"{data.url} has no identities: a recogniser learns to tell people apart, ingest the images with labels")
    found, people = 1 + max(each.last for each in labels), sum(each.count for each in labels)
    if num_classes not in (None, found):
        raise TrainError(f"--num-classes {num_classes}, but the labels of {data.url} are 0 to {found - 1}: give {found}, or leave it out")
    if found < 2:
        raise TrainError(f"{data.url} has one person: a recogniser learns to tell people apart, give two or more")
    if found > MOST_CLASSES_A_PERSON * people:
        raise TrainError(f"the largest label of {data.url} is {found - 1}, at most {people} people: ingest it again, numbered from 0")
    if people < found:
        print(f"{data.url}: labels with gaps, at most {people} of {found} people have pictures; the others' centres are negatives alone")
    return found


def _deepspeed(recipe: PretrainRecipe, options: TrainOptions) -> dict[str, Any]:
    """The user's DeepSpeed configuration, or ours (ZeRO 1, gradient norm clipped at 5, autocast to bf16 on GPUs).

    Raises:
        TrainError: a mode that batch norms or checkpoints cannot bear; what ``merge_deepspeed`` raises.
    """
    autocast = {"enabled": options.use_gpu, "dtype": "bfloat16"}
    ours = {"zero_optimization": {"stage": 1}, "torch_autocast": autocast, "gradient_clipping": 5.0}
    user: Mapping[str, Any] = ours if options.deepspeed is None else options.deepspeed
    config = merge_deepspeed(user, batch_size=recipe.batch_size, world_size=options.num_workers, use_gpu=options.use_gpu)
    refused = {
        "bf16": (config.get("bf16", {}).get("enabled") is True, "use torch_autocast, which leaves batch norms in float32"),
        "ZeRO 3": (config.get("zero_optimization", {}).get("stage", 0) == 3, "use stage 1 or 2: what is large are the centres"),
    }
    for name, (found, remedy) in refused.items():
        if found:
            raise TrainError(f"the DeepSpeed configuration asks for {name}, which a recogniser does not take: {remedy}")
    # the optimiser is torch's SGD, which DeepSpeed has not tried and which it need not know
    return {**config, "zero_allow_untested_optimizer": True, "steps_per_print": sys.maxsize}
