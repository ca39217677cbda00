"""What tests of training share: a small training set, a training in 8 steps, the same in plain torch, and readers of what a run wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embed import EmbedProcessor
from cluster.picture import encode
from cluster.processor import Unit
from cluster.shard import Sample, ShardWriter
from cluster.store import open_store
from cluster.stream import Stream
from cluster.train_job import FaceMaeJob, Recipe, TrainOptions, plan_training
from facemae.model import MaskedAutoencoder
from facemae.recognizer.compact import CompactNet
from facemae.recognizer.export import export_onnx
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.training import LossConfig, ReconstructionLoss, batch_loss, learning_rate, param_groups

COMMIT: dict[str, Any] = {"fingerprint": "f", "attempt": Attempt("run", 1), "seconds": {}}


def write_training_set(root: Path, embedded: bool = True) -> Dataset:
    """Blocks of colour, one pattern an identity, in three shards; a random recogniser (root/toy.onnx) and its embeddings."""
    dataset, random = Dataset(str(root / "data")), np.random.default_rng(0)
    for shard in range(3):
        writer = ShardWriter()
        for number in range(shard * 20, shard * 20 + 20):
            pattern = np.random.default_rng(number // 4).integers(0, 255, (7, 7, 3)).repeat(16, 0).repeat(16, 1)
            picture = np.clip(pattern + random.normal(0, 10, (112, 112, 3)), 0, 255).astype(np.uint8)
            writer.add(Sample(f"k{number:03d}", encode(picture), number // 4))
        dataset.commit(f"{shard:05d}", ShardData(writer.finish(), 20, Labels.of(writer.labels)), **COMMIT)
    dataset.finish("images", {"fingerprint": "f"}, dataset.manifests())
    torch.manual_seed(0)
    export_onnx(CompactNet(dim=16, width=4), root / "toy.onnx")
    if embedded:
        processor = EmbedProcessor(dataset.url, str(root / "toy.onnx"))
        processor.open(1)
        embeddings = dataset.embeddings("toy")
        for name in dataset.names():
            embeddings.commit(name, processor.compute(Unit(name), processor.fetch(Unit(name))), **COMMIT)
        embeddings.finish("embeddings", {"fingerprint": "e", "config": processor.describe()}, embeddings.manifests())
    return dataset


def plan(folder: Path, output: str, workers: int, stage: int, recipe: Mapping[str, Any] | None = None, **options: Any) -> FaceMaeJob:
    """8 steps, of which 4 are an epoch, or more where the recipe says more samples than 120."""
    values: dict[str, Any] = {"batch_size": 16, "images_per_identity": 2, "samples": 120, "lr": 1e-2, **(recipe or {})}
    deepspeed = {"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}
    return plan_training(
        Dataset(str(folder / "data")),
        output,
        Recipe("facemae_tiny_patch16_112", LossConfig.preset("irm+pixel"), **values),
        OnnxRecognizer.load(folder / "toy.onnx"),
        TrainOptions(num_workers=workers, deepspeed=deepspeed, log_every=1, **{"grid_every": 0, **options}),
    )


def curve(url: str, folder: Path) -> dict[int, float]:
    """The loss by step, from the TensorBoard files of all attempts at a run; the last attempt at a step counts."""
    store = open_store(url)
    files = sorted(stored.key for stored in store.list("tensorboard/"))
    found: dict[int, float] = {}
    for number, key in enumerate(files):
        place = folder / f"events-{number}"
        place.mkdir()
        (place / Path(key).name).write_bytes(store.get(key))
        events = EventAccumulator(str(place))
        events.Reload()
        found.update({event.step: event.value for event in events.Scalars("train/loss")})
    return found


def weights(url: str) -> dict[str, torch.Tensor]:
    return load(open_store(url).get("weights/model.safetensors"))


def initial(name: str = "facemae_tiny_patch16_112") -> MaskedAutoencoder:
    """The untrained weights of seed 0."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    assert isinstance(model, MaskedAutoencoder)
    return model


def reference(job: FaceMaeJob) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """The same training, undisturbed, in one process and plain torch: the loss by step, and the weights."""
    assert job.recognizer is not None
    model, loss = initial(), ReconstructionLoss(job.recipe.loss, job.recognizer.differentiable())
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), betas=(0.9, 0.95))
    losses, seen, total = dict[int, float](), 0, job.plan.samples_before(job.steps)
    for step, batch in enumerate(Stream(Dataset(job.data), job.plan, "toy").batches(0, job.steps), start=1):
        seen += len(batch.keys)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seen, base_lr=1e-2 * 16 / 256, total=total, warmup=0.05 * total)
        value, metrics = batch_loss(model, loss, batch, num_patches=49, mask_ratio=0.75, seed=0)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[step] = float(metrics["loss"])
    return losses, model.state_dict()


def assert_as_undisturbed(url: str, folder: Path, expected: tuple[dict[int, float], dict[str, torch.Tensor]]) -> None:
    """The loss of every step, and the weights, are those of an undisturbed training (``reference``)."""
    (losses, theirs), found, ours = expected, curve(url, folder), weights(url)
    assert sorted(found) == sorted(losses)
    for step, loss in losses.items():
        assert found[step] == pytest.approx(loss, rel=2e-3), f"step {step}"
    first, last = (np.mean([losses[step] for step in sorted(losses)[epoch]]) for epoch in (slice(4), slice(-4, None)))
    assert last < 0.95 * first  # and it does learn
    start, end, other = (torch.cat([each[name].flatten() for name in theirs]) for each in (initial().state_dict(), theirs, ours))
    assert (end - other).norm() < 0.02 * (end - start).norm()
