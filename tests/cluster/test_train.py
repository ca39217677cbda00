"""Distributed training: the same curve and weights for any number of workers and ZeRO stage, also after a kill and a resume."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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
from cluster.scheduler import Interrupted
from cluster.shard import Sample, ShardWriter
from cluster.store import StoreError, open_store
from cluster.stream import Stream
from cluster.train import train
from cluster.train_job import Recipe, TrainError, TrainJob, TrainOptions, merge_deepspeed, plan_training
from cluster.weights import local_weights
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_training_set(folder)
    return folder


def plan(folder: Path, output: str, workers: int, stage: int, recipe: Mapping[str, Any] | None = None, **options: Any) -> TrainJob:
    """8 steps, of which 4 are an epoch."""
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


class Killer(threading.Thread):
    """Kills one training worker once the run has a checkpoint, and asks the run to stop while the group restarts."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.killed = url, 0

    def run(self) -> None:
        store = open_store(self.url)
        while not any(stored.key.endswith(".json") for stored in store.list("checkpoints/")):
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if process.name().startswith("ray::RayTrainW"):
                self.killed = process.pid
                os.kill(process.pid, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGTERM)
                return


@pytest.mark.faults
@pytest.mark.s3
def test_a_run_that_is_killed_stopped_and_moved_ends_as_an_undisturbed_one(ray_session: None, folder: Path, s3_root: str, tmp_path: Path):
    moved = plan(folder, s3_root, workers=2, stage=3, checkpoint_every=2, grid_every=3, max_failures=2)
    killer = Killer(s3_root)
    killer.start()
    with pytest.raises(Interrupted, match=r"stopped at step [3-7] of 8"):
        train(moved)
    assert killer.killed
    with pytest.raises(TrainError, match=r"checkpoints of other settings \(lr: 0\.01 there, 0\.5 now\)"):
        train(plan(folder, s3_root, workers=1, stage=1, recipe={"lr": 0.5}))
    with pytest.raises(StoreError, match="holds no weights"):
        local_weights(s3_root)
    result = train(plan(folder, s3_root, workers=1, stage=1, grid_every=3))

    expected, theirs = reference(plan(folder, s3_root, workers=1, stage=0))
    found, ours = curve(s3_root, tmp_path), weights(s3_root)
    assert sorted(found) == sorted(expected) == list(range(1, 9))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=2e-3), f"step {step}"
    assert expected[8] < 0.9 * expected[1]  # and it does learn
    start, end, other = (torch.cat([each[name].flatten() for name in theirs]) for each in (initial().state_dict(), theirs, ours))
    assert (end - other).norm() < 0.02 * (end - start).norm()

    assert result["samples"] == 120
    assert {stored.key for stored in open_store(s3_root).list("grids/")} == {"grids/00000003.png", "grids/00000006.png"}
    model = MaskedAutoencoder.from_pretrained(local_weights(s3_root), expected_sha256=result["weights"]["sha256"])
    assert model.architecture.name == "facemae_tiny_patch16_112"
    assert train(plan(folder, s3_root, workers=2, stage=2)) == json.loads(open_store(s3_root).get("run.json"))  # nothing is done twice


def initial() -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = timm.create_model("facemae_tiny_patch16_112")
    assert isinstance(model, MaskedAutoencoder)
    return model


def reference(job: TrainJob) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """The same training, undisturbed, in one process and plain torch: the loss by step, and the weights."""
    assert job.recognizer is not None
    model, loss = initial(), ReconstructionLoss(job.recipe.loss, job.recognizer.differentiable())
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), betas=(0.9, 0.95))
    losses, seen = dict[int, float](), 0
    for step, batch in enumerate(Stream(Dataset(job.data), job.plan, "toy").batches(0, job.steps), start=1):
        seen += len(batch.keys)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seen, base_lr=1e-2 * 16 / 256, total=120, warmup=0.05 * 120)
        value, metrics = batch_loss(model, loss, batch, num_patches=49, mask_ratio=0.75, seed=0)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[step] = float(metrics["loss"])
    return losses, model.state_dict()


def test_an_error_that_trying_again_cannot_help_ends_the_run_with_its_reason(ray_session: None, folder: Path, tmp_path: Path):
    broken = write_training_set(tmp_path, embedded=False)  # the driver's check is the job's
    job = plan(tmp_path, str(tmp_path / "run"), workers=1, stage=1, max_failures=5)
    started = time.perf_counter()
    with pytest.raises(TrainError, match=r"has no shard 0000\d: run `facemae embed`"):
        train(job)
    assert time.perf_counter() - started < 100
    assert broken.names()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "'optimizer': remove it.*--lr"),
        ({"scheduler": {}}, "'scheduler': remove it"),
        ({"train_batch_size": 32}, "train_batch_size 32, it must be 64 or absent: --batch-size is 64"),
        ({"train_micro_batch_size_per_gpu": 64}, "train_micro_batch_size_per_gpu 64, it must be 32"),
        ({"gradient_accumulation_steps": 2}, "whole batch in one step"),
        ({"fp16": {"enabled": True}}, "fp16, which is not supported: use bf16"),
        ({"bf16": {"enabled": True}}, "stage to 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "nvme"),
    ],
)
def test_deepspeed_configurations_that_contradict_ours_are_refused(config: dict[str, Any], message: str):
    with pytest.raises(TrainError, match=message):
        merge_deepspeed(config, batch_size=64, world_size=2, use_gpu=False)


def test_deepspeed_configurations_are_completed_and_left_alone():
    user = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "bf16": {"enabled": True}}
    merged = merge_deepspeed(user, batch_size=64, world_size=2, use_gpu=False)
    assert merged["train_batch_size"] == 64
    assert merged["train_micro_batch_size_per_gpu"] == 32
    assert merged["zero_optimization"] == {"stage": 2}
    assert user["train_batch_size"] == "auto"
    assert merge_deepspeed(None, batch_size=64, world_size=1, use_gpu=True)["bf16"] == {"enabled": True}
    assert merge_deepspeed(None, batch_size=64, world_size=1, use_gpu=False)["bf16"] == {"enabled": False}


def test_weights_are_checked_wherever_they_are(tmp_path: Path):
    initial().save_pretrained(tmp_path / "run" / "weights")
    assert local_weights(str(tmp_path / "run")) == local_weights(str(tmp_path / "run" / "weights")) == tmp_path / "run" / "weights"
    file = tmp_path / "run" / "weights" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"has sha256 .* says"):
        local_weights(str(tmp_path / "run"))
    with pytest.raises(StoreError, match="holds no weights"):
        local_weights(str(tmp_path))
