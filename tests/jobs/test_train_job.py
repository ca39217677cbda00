"""``facemae train``: from the command line to weights that generation can use, and what it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from facemae.protection import create_protection
from jobs.train import TrainConfig, main, run
from tests.training import write_training_set

SMALL = ["--architecture", "facemae_tiny_patch16_112", "--batch-size", "16", "--images-per-identity", "2", "--log-every", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_training_set(folder, embedded=False)
    return folder


def test_two_workers_train_to_weights_that_protect(
    ray_session: None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}, "gradient_clipping": 0.5}))
    monkeypatch.chdir(tmp_path)  # relative paths mean this folder also in the workers
    data = os.path.relpath(folder / "data")
    flags = ["--data", data, "--output", "run", "--loss", "mse", "--deepspeed", "ds.json", "--num-workers", "2", "--epochs", "1"]
    assert main([*flags, *SMALL, "--grid-every", "2"]) == 0
    printed = capsys.readouterr().out
    assert "60 images, 4 steps an epoch, 4 in all = 60 images seen; 2 workers, ZeRO 2" in printed
    assert "--weights run" in printed
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["samples"] == 60
    assert record["world_size"] == 2
    assert record["metrics"].keys() == {"loss", "pixel", "lr"}
    assert record["parent"]["samples"] == 60
    assert record["config"]["gradient_clipping"] == 0.5
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "attempts",
        "checkpoints",
        "grids",
        "keys",
        "run.json",
        "tensorboard",
        "weights",
    ]
    protection = create_protection("facemae", weights=str(tmp_path / "run" / "weights"))
    assert protection.protect(np.zeros((2, 112, 112, 3), np.uint8), ["a", "b"]).shape == (2, 112, 112, 3)
    assert main([*flags, *SMALL, "--grid-every", "2"]) == 0  # finished: nothing to do
    assert main([*flags, *SMALL, "--seed", "1"]) == 2
    assert "finished training of other settings (seed: 0 there, 1 now)" in capsys.readouterr().err


def test_missing_embeddings_name_the_command_that_makes_them(folder: Path, capsys: pytest.CaptureFixture[str]):
    data, recognizer = str(folder / "data"), str(folder / "toy.onnx")
    assert main(["--data", data, "--output", str(folder / "x"), "--recognizer", recognizer, *SMALL]) == 2
    assert f"facemae embed --input {data} --recognizer {recognizer}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--recognizer FILE.onnx, or train with --loss mse"),
        ({"loss": "mse", "architecture": "resnet18"}, "unknown architecture 'resnet18': choose one of facemae_"),
        ({"loss": "mse", "mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"loss": "mse", "pixel_weight": -1.0}, "none below 0"),
        ({"loss": "mse", "epochs": 0.0}, "less than one image"),
        ({"loss": "mse", "batch_size": 10}, "multiple of lanes x images per identity = 16"),
        ({"loss": "mse", "lanes": 40}, "60 samples are too few for 40 lanes"),
        ({"loss": "mse", "num_workers": 3}, "3 workers do not divide 4 lanes"),
        ({"loss": "mse", "gpus_per_worker": 0.5}, "one GPU or none"),
        ({"loss": "mse", "deepspeed": "{folder}/toy.json"}, None),
        ({"loss": "mse", "deepspeed": "{folder}/missing.json"}, "does not exist"),
        ({"loss": "mse", "deepspeed": "{folder}/toy.onnx"}, "is no DeepSpeed JSON"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_worker_starts(
    ray_session: None, folder: Path, tmp_path: Path, changes: dict[str, object], message: str | None
):
    if message is None:
        (folder / "toy.json").write_text('{"optimizer": {"type": "AdamW"}}')
        message = "'optimizer': remove it"
    changes = {name: value.format(folder=folder) if isinstance(value, str) else value for name, value in changes.items()}
    if changes.get("lanes") == 40:
        changes["batch_size"] = 160
    config = TrainConfig(data=str(folder / "data"), output=str(tmp_path / "run"), **changes)  # type: ignore[arg-type]
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        run(config)
    assert not (tmp_path / "run").exists()
