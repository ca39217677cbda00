"""Distributed training: the same curve and weights for any number of workers and ZeRO stage, also after a kill and a resume."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.scheduler import Interrupted
from cluster.store import StoreError, open_store
from cluster.train import train
from cluster.train_job import FaceMaeJob, TrainError, merge_deepspeed
from cluster.train_worker import FaceMaeTrainer
from cluster.weights import local_weights
from facemae.model import MaskedAutoencoder
from tests.faults.training_killer import TrainingKiller
from tests.training import assert_as_undisturbed, plan, reference, write_training_set


@dataclasses.dataclass(frozen=True)
class CountedJob(FaceMaeJob):
    """A training whose every start leaves a mark beside its output."""

    trainer = "tests.cluster.test_train:CountedTrainer"


class CountedTrainer(FaceMaeTrainer):
    """See CountedJob."""

    def __init__(self, job: FaceMaeJob, board: Any) -> None:
        (Path(job.output).parent / f"start-{os.getpid()}").touch()
        super().__init__(job, board)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_training_set(folder)
    return folder


@pytest.mark.faults
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_a_run_that_is_killed_stopped_and_moved_ends_as_an_undisturbed_one(
    long: None, ray_session: None, folder: Path, s3_root: str, tmp_path: Path
):
    """Of what it has in common with pretraining, tests/cluster/test_pretrain.py has the short case."""
    moved = plan(folder, s3_root, workers=2, stage=3, checkpoint_every=2, grid_every=3, max_failures=2)
    killer = TrainingKiller(s3_root, os.getpid(), [(2, "worker"), (2, "stop")], seed=0)
    killer.start()
    with pytest.raises(Interrupted, match=r"stopped at step [3-7] of 8"):
        train(moved)
    assert [kill.what for kill in killer.kills] == ["worker", "stop"]
    with pytest.raises(TrainError, match=r"checkpoints of other settings \(lr: 0\.01 there, 0\.5 now\)"):
        train(plan(folder, s3_root, workers=1, stage=1, recipe={"lr": 0.5}))
    with pytest.raises(StoreError, match="holds no weights"), local_weights(s3_root):
        pass
    result = train(plan(folder, s3_root, workers=1, stage=1, grid_every=3))

    assert_as_undisturbed(s3_root, tmp_path, reference(plan(folder, s3_root, workers=1, stage=0)))
    assert result["samples"] == 120
    assert {stored.key for stored in open_store(s3_root).list("grids/")} == {"grids/00000003.png", "grids/00000006.png"}
    with local_weights(s3_root) as weights:
        model = MaskedAutoencoder.from_pretrained(weights, expected_sha256=result["weights"]["sha256"])
    assert model.architecture.name == "facemae_tiny_patch16_112"
    assert train(plan(folder, s3_root, workers=2, stage=2)) == json.loads(open_store(s3_root).get("run.json"))  # nothing is done twice
    open_store(s3_root).delete("run.json")  # as if killed between the last checkpoint and the end
    assert train(plan(folder, s3_root, workers=1, stage=1)) == result


def test_an_error_that_trying_again_cannot_help_ends_the_run_with_its_reason(ray_session: None, folder: Path, tmp_path: Path):
    write_training_set(tmp_path, embedded=False)  # the driver's check is the job's
    planned = plan(tmp_path, str(tmp_path / "run"), workers=1, stage=1, max_failures=5)
    job = CountedJob(**{field.name: getattr(planned, field.name) for field in dataclasses.fields(planned)})
    with pytest.raises(TrainError, match=r"has no shard 0000\d: run `facemae embed`"):
        train(job)
    assert len(list(tmp_path.glob("start-*"))) == 1, "it was not tried again"


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
