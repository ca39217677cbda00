"""``facemae pretrain``: what is refused before a worker starts, and where first weights may come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.dataset import Dataset, Labels, ShardData
from cluster.picture import encode
from cluster.pretrain import pretrain_alone
from cluster.recognizer_file import local_recognizer
from cluster.scheduler import StageError
from cluster.shard import Sample, ShardWriter
from cluster.store import StoreError, open_store
from facemae.recognizer.backbone import create_backbone
from facemae.recognizer.export import export_onnx
from facemae.recognizer.pretrained import load_backbone, save_backbone
from jobs.pretrain import PretrainConfig, main, prepare, require_recipe
from tests.training import COMMIT, write_training_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain-job")
    write_training_set(folder, embedded=False)
    return folder


def config(folder: Path, **changes: Any) -> PretrainConfig:
    small: dict[str, Any] = {"backbone": "compact-4", "dim": 8, "batch_size": 16, "samples": 32, "num_workers": 1}
    if "init" in changes:  # it brings both
        small |= {"backbone": None, "dim": None}
    return PretrainConfig(**{"data": str(folder / "data"), "output": str(folder / "run"), **small, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "iresnet51"}, "unknown backbone 'iresnet51': give one of iresnet18"),
        ({"backbone": "timm/vit_tny"}, "timm has no network 'vit_tny'; near: "),
        ({"margin_value": -0.1}, "margin must be 0 or more"),
        ({"rate": 0.0}, r"--rate 0\.0: give a number above 0, up to 1"),
        ({"crop": 1.0}, r"crop is 1\.0"),
        ({"num_classes": 16}, r"--num-classes 16, but the labels of .* are 0 to 14"),
        ({"batch_size": 18}, "give a multiple of lanes x images per identity"),
        ({"num_workers": 3}, "3 workers do not divide 4 lanes"),
        ({"epochs": 0.0, "samples": None}, "less than one image"),
        ({"samples": 0}, "less than one image"),
        ({"lr": -1.0}, r"--lr -1\.0: give a number above 0"),
        ({"weight_decay": -0.1}, r"--weight-decay -0\.1: give a number from 0"),
        ({"seed": -1}, "give 0 or more"),
        ({"data": "nowhere"}, "holds no data set"),
        ({"init": "nowhere.onnx"}, r"nowhere\.onnx"),
        ({"gpus_per_worker": 0.5}, "one GPU or none"),
    ],
)
def test_what_cannot_be_trained_is_said_before_a_worker_starts(folder: Path, changes: dict[str, Any], message: str):
    with pytest.raises((ValueError, FileNotFoundError, StageError, StoreError), match=message):
        prepare(config(folder, **changes))


def test_the_command_says_it_in_one_line(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["--data", str(folder / "data"), "--output", str(folder / "data" / "run")]) == 2
    assert "lie in each other: choose an output beside it" in capfd.readouterr().err


def test_labels_with_gaps_and_people_with_one_image_are_trained_on_and_said(
    tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
):
    dataset, writer = Dataset(str(tmp_path / "data")), ShardWriter()
    picture = encode(np.zeros((112, 112, 3), np.uint8))
    for number, identity in enumerate([0, 0, 0, 7, 7, 7, 9, 12]):
        writer.add(Sample(f"k{number}", picture, identity))
    dataset.commit("00000", ShardData(writer.finish(), 8, Labels.of(writer.labels)), **COMMIT)
    dataset.finish("images", {"fingerprint": "f"}, dataset.manifests())
    job = prepare(config(tmp_path, batch_size=4, samples=8))
    assert "labels with gaps, at most 4 of 13 people have pictures" in capsys.readouterr().out
    assert job.recipe.num_classes == 13
    assert ray.get(ray.remote(max_calls=1)(pretrain_alone).remote(job))["samples"] == 8


def test_first_weights_come_from_a_folder_or_an_onnx_file(folder: Path, tmp_path: Path, ray_session: None):
    net = create_backbone("compact-plain-4", 12, seed=3).eval()
    digest = save_backbone(net, tmp_path / "weights")
    recipe = prepare(config(folder, init=str(tmp_path / "weights"))).recipe
    assert (recipe.backbone, recipe.dim, recipe.init_sha256) == ("compact-plain-4", 12, digest)
    with pytest.raises(ValueError, match=r"--backbone compact-4, but .*weights holds compact-plain-4: leave --backbone out"):
        prepare(config(folder, init=str(tmp_path / "weights"), backbone="compact-4"))
    digest = export_onnx(net, tmp_path / "start.onnx")
    recipe = prepare(config(folder, init=str(tmp_path / "start.onnx"))).recipe
    assert (recipe.backbone, recipe.dim, recipe.init_sha256) == ("onnx/start", 12, digest)
    first = prepare(config(folder, output=str(tmp_path / "first"), init=str(tmp_path / "start.onnx")))
    ray.get(ray.remote(max_calls=1)(pretrain_alone).remote(first))
    assert prepare(config(folder, init=str(tmp_path / "first"))).recipe.backbone == "onnx/start"  # its run can be a start again


@pytest.mark.s3
def test_first_weights_in_s3_are_read_by_driver_and_worker_and_must_be_the_same(tmp_path: Path, s3_root: str):
    store, file = open_store(s3_root), tmp_path / "start.onnx"
    digest = export_onnx(create_backbone("compact-plain-4", 12, seed=3).eval(), file)
    for part in (file, file.with_suffix(".json")):
        store.put(part.name, part.read_bytes())
    recipe = require_recipe(PretrainConfig(data="d", output="o", init=f"{s3_root}/start.onnx"))
    assert recipe == {"backbone": "onnx/start", "dim": 12, "init": f"{s3_root}/start.onnx", "init_sha256": digest}
    with local_recognizer(recipe["init"], digest) as here:
        assert load_backbone(here, 12).name == "onnx/start"
    with pytest.raises(StoreError, match="overwritten"), local_recognizer(recipe["init"], "0" * 64):
        pass
