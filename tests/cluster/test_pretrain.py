"""Distributed pretraining of recognisers: the same weights and centres on any number of workers, also after a kill and a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load
from torch.nn import functional

from cluster.centers import load_rows
from cluster.checkpoint import Checkpoints
from cluster.dataset import Dataset
from cluster.pretrain import pretrain_alone
from cluster.pretrain_job import PretrainJob, PretrainRecipe, count_classes, plan_pretraining
from cluster.scheduler import Interrupted
from cluster.status import State, TrainingStatus, Watch
from cluster.store import open_store
from cluster.stream import Stream
from cluster.train import train
from cluster.train_job import TrainError, TrainOptions
from cluster.verify_training import verify_training
from facemae.recognizer.augment import AugmentConfig, augment
from facemae.recognizer.backbone import create_backbone
from facemae.recognizer.margin import MarginHead, create_margin
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.recognizer.partial_fc import PartialFC
from facemae.recognizer.pretrained import load_backbone
from facemae.recognizer.train import polynomial_rate
from tests.faults.training_killer import TrainingKiller
from tests.training import write_training_set

WITHOUT_BATCH_NORM = "timm/test_vit"
"""A batch norm sees its rank's pictures only, so with one the number of ranks would show in the weights."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_training_set(tmp_path_factory.mktemp("pretrain"), embedded=False)


def plan(data: Dataset, output: str, workers: int = 1, stage: int = 1, recipe: dict[str, Any] | None = None, **options: Any) -> PretrainJob:
    """8 steps of 16 images, 15 people, with every dial of the augmentation turned."""
    recipe = {
        "backbone": WITHOUT_BATCH_NORM, "dim": 32, "margin": "adaface", "scale": 16.0, "batch_size": 16, "samples": 120, "lr": 0.05,
        "num_classes": count_classes(data), "augment": AugmentConfig(crop=0.1, erase=0.5, color=0.2), **(recipe or {}),
    }  # fmt: skip
    deepspeed = {"zero_optimization": {"stage": stage}, "gradient_clipping": 5.0}
    return plan_pretraining(
        data,
        output,
        PretrainRecipe(**recipe),
        TrainOptions(num_workers=workers, deepspeed=deepspeed, log_every=1, grid_every=0, **options),
    )


def reference(job: PretrainJob) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same training, undisturbed, in one process and plain torch with the whole softmax: the backbone's weights, and the centres."""
    recipe, net = job.recipe, create_backbone(job.recipe.backbone, job.recipe.dim, job.recipe.seed)
    head = MarginHead(recipe.dim, recipe.num_classes, create_margin(recipe.margin, scale=recipe.scale))
    with torch.no_grad():
        head.weight.copy_(PartialFC(recipe.dim, recipe.num_classes, create_margin("cosface"), seed=recipe.seed).rows()[1])
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4) for module in (net, head)]
    for step, batch in enumerate(Stream(Dataset(job.data), job.plan).batches(0, job.steps)):
        images = augment(torch.as_tensor(batch.images), batch.keys, batch.epoch, recipe.seed, recipe.augment)
        labels = torch.as_tensor(batch.identities)
        loss = functional.cross_entropy(head(net(images), labels), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = polynomial_rate(step, job.steps, recipe.lr, round(recipe.warmup * job.steps))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        for optimizer in optimizers:
            optimizer.step()
    return net.state_dict(), head.weight.detach()


def centers_of(job: PretrainJob) -> torch.Tensor:
    """The centres in a run's last checkpoint."""
    store = open_store(job.output)
    parts = Checkpoints(store).describe(job.steps)["parts"]
    return torch.cat([tables["weight"] for _, tables in load_rows(store, parts, 0, job.recipe.num_classes)])


@pytest.mark.faults
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_stopped_and_moved_ends_as_an_undisturbed_one(long: None, ray_session: None, data: Dataset, s3_root: str):
    killer = TrainingKiller(s3_root, os.getpid(), [(2, "worker"), (2, "stop")], seed=0)
    killer.start()
    with pytest.raises(Interrupted, match=r"stopped at step [3-7] of 8"):
        train(plan(data, s3_root, workers=2, stage=2, checkpoint_every=2, max_failures=2))
    assert [kill.what for kill in killer.kills] == ["worker", "stop"]
    (status,) = Watch(s3_root).look().parts
    assert isinstance(status, TrainingStatus)
    assert status.attempts is not None
    (stopped,) = status.attempts
    assert stopped.tally is not None
    assert (status.state, stopped.state, stopped.tally.steps, stopped.tally.step) == (State.UNFINISHED, "stopped", 8, status.step)
    assert f"it goes on with the checkpoint of step {status.step}" in status.next
    with pytest.raises(TrainError, match=r"checkpoints of other settings \(rate: 1\.0 there, 0\.5 now\)"):
        train(plan(data, s3_root, recipe={"rate": 0.5}))
    job = plan(data, s3_root)
    result = train(job)

    assert result["samples"] == 120
    weights, centers = reference(job)
    ours, start = load(open_store(s3_root).get("weights/model.safetensors")), create_backbone(WITHOUT_BATCH_NORM, 32, 0).state_dict()
    whole = [torch.cat([each[name].flatten() for name in sorted(weights)]) for each in (start, weights, ours)]
    assert (whole[2] - whole[1]).norm() < 0.01 * (whole[1] - whole[0]).norm()
    torch.testing.assert_close(centers_of(job), centers, rtol=1e-3, atol=1e-5)
    found = verify_training(s3_root)
    assert found.ok, found.problems
    assert found.keys is not None
    assert (found.keys.steps, found.keys.samples) == (8, 120)
    (status,) = Watch(s3_root).look().parts
    assert isinstance(status, TrainingStatus)
    assert (status.state, status.step, status.samples, status.checkpoint) == (State.COMPLETE, 8, 120, 8)
    assert [attempt.state for attempt in status.attempts or ()] == ["stopped", "ended"]
    assert status.metrics == result["metrics"]


def test_one_process_leaves_a_recognizer_in_every_form(ray_session: None, data: Dataset, tmp_path: Path):
    job = plan(data, str(tmp_path / "run"), recipe={"backbone": "compact-plain-4", "margin": "arcface", "rate": 0.5})
    result = ray.get(ray.remote(max_calls=1)(twice).remote(job))
    assert result[0] == result[1] == json.loads((tmp_path / "run" / "run.json").read_text())
    recognizer = OnnxRecognizer.load(tmp_path / "run" / "weights" / "recognizer.onnx")
    net = load_backbone(tmp_path / "run" / "weights", dim=32)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    with torch.no_grad():
        expected = functional.normalize(net(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1))
    np.testing.assert_allclose(recognizer.embed(pictures), expected.numpy(), atol=1e-4)
    assert recognizer.name == "run"
    assert verify_training(str(tmp_path / "run")).ok
    with pytest.raises(TrainError, match="2 workers, but a task trains alone"):
        pretrain_alone(plan(data, str(tmp_path / "other"), workers=2))


def twice(job: PretrainJob) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, and find it trained."""
    return pretrain_alone(job), pretrain_alone(job)


def test_a_number_of_people_that_the_shards_do_not_have_is_refused(data: Dataset, capsys: pytest.CaptureFixture[str]):
    assert count_classes(data) == count_classes(data, 15) == 15
    assert capsys.readouterr().out == ""
    with pytest.raises(TrainError, match=r"--num-classes 10, but the labels of .* are 0 to 14: give 15, or leave it out"):
        count_classes(data, 10)


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "bf16, which a recogniser does not take: use torch_autocast"),
        ({"zero_optimization": {"stage": 3}}, "ZeRO 3, which a recogniser does not take: use stage 1 or 2"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer': remove it"),
    ],
)
def test_deepspeed_configurations_that_recognizers_do_not_take_are_refused(data: Dataset, deepspeed: dict[str, Any], message: str):
    recipe = PretrainRecipe("compact", AugmentConfig(), num_classes=15, batch_size=16)
    with pytest.raises(TrainError, match=message):
        plan_pretraining(data, "unused", recipe, TrainOptions(deepspeed=deepspeed))
