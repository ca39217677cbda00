from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torchvision.io import encode_jpeg

from benchmarks.search import pack, settings
from benchmarks.search.bundle import Pictures, read_bundle, write_bundle
from benchmarks.search.learn import begin, embed
from benchmarks.search.measure import area, best_threshold, leakage, utility, verification
from benchmarks.search.packed import PackedRecognizer
from facemae.synthetic import SyntheticFaces

ROOT = Path(__file__).parents[2]
BLOCKED = ("ray", "deepspeed", "faiss", "onnx", "onnx2torch", "onnxruntime", "boto3", "webdataset", "pyarrow", "simplejpeg", "pydantic")
BARE = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED})); from benchmarks.search.run import main; main(sys.argv[1:])"
"""The search where importing any of these fails."""


def graph(seed: int = 0) -> onnx.ModelProto:
    """A small recogniser of the operators that mobile ones use, written by hand: strided, depthwise, clipped, shortcut, flattened."""
    generator = np.random.default_rng(seed)
    shapes = {"stem": (8, 3, 5, 5), "deep": (8, 1, 3, 3), "wide": (8, 8, 1, 1), "head": (16, 8, 7, 7), "slope": (8, 1, 1)}
    weights = [numpy_helper.from_array(generator.normal(0, 0.2, shape).astype(np.float32), name) for name, shape in shapes.items()]
    weights += [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("low", 0.0), ("high", 6.0))]
    nodes = [
        helper.make_node("Conv", ["input", "stem"], ["a"], strides=[16, 16], pads=[2, 2, 2, 2], kernel_shape=[5, 5]),
        helper.make_node("Clip", ["a", "low", "high"], ["b"]),
        helper.make_node("Conv", ["b", "deep"], ["c"], pads=[1, 1, 1, 1], group=8, kernel_shape=[3, 3]),
        helper.make_node("PRelu", ["c", "slope"], ["d"]),
        helper.make_node("Add", ["b", "d"], ["e"]),
        helper.make_node("Conv", ["e", "wide"], ["f"], kernel_shape=[1, 1]),
        helper.make_node("Relu", ["f"], ["g"]),
        helper.make_node("Conv", ["g", "head"], ["h"], kernel_shape=[7, 7]),
        helper.make_node("Flatten", ["h"], ["embedding"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *tail]) for name, tail in (("input", [3, 112, 112]), ("embedding", [16]))]
    model = helper.make_graph(nodes, "small", ends[:1], ends[1:], weights)
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def jpegs(faces: SyntheticFaces) -> list[bytes]:
    pictures = torch.from_numpy(faces.render(np.arange(len(faces)))).permute(0, 3, 1, 2).contiguous()
    return [bytes(encode_jpeg(picture, 95).numpy()) for picture in pictures]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 24 faces, packed by the script from folders as a user has them."""
    folder = tmp_path_factory.mktemp("search")
    for part, seed in (("train", 0), ("protected", 1), ("test", 2)):
        for number, jpeg in enumerate(jpegs(SyntheticFaces(4, 2, seed=seed))):
            person = folder / part / f"{part}{number // 2}"
            person.mkdir(parents=True, exist_ok=True)
            (person / f"{number % 2 + 1:04d}.jpg").write_bytes(jpeg)
    rows = [(f"{part}{number}", fold) for part, fold in (("train", 1), ("test", 7)) for number in range(4)]
    (folder / "folds.csv").write_text("identity,images,fold\n" + "".join(f"{name},2,{fold}\n" for name, fold in rows))
    lines = ["2\t1", *(f"train{k}\t1\ttrain{k + 1}\t1" for k in range(12)), "test0\t1\t2", "test1\t1\ttest2\t1"]
    (folder / "pairs.txt").write_text("\n".join(lines))
    onnx.save(graph(), folder / "inside.onnx")
    (folder / "inside.json").write_text('{"name": "inside", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}')
    torch.manual_seed(0)
    settings.Setting("start").network().save_pretrained(folder / "start")
    pack.main(arguments(folder))
    return folder / "search.safetensors"


def arguments(folder: Path, **changes: str) -> list[str]:
    given = {"train": "train", "protected": "protected", "test": "test", "pairs": "pairs.txt", "folds": "folds.csv", "start": "start"}
    given |= {"recognizer": "inside.onnx", "output": "search.safetensors", **changes}
    paths = [part for name, file in given.items() for part in (f"--{name}", str(folder / file))]
    return [*paths, "--test-folds", "7"]


def test_a_bare_machine_trains_measures_tabulates_and_goes_on(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", BARE, "--bundle", str(packed), "--output", str(out), "--settings", "ablation", "--device", "cpu"]
    command += ["--only", "irm+pixel", "irm+pixel patch 8, fresh ends", "--samples", "128", "--recognizer-samples", "64", "--width", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "search.json").read_text())
    assert list(result["rows"]) == ["original", "pixelate 8", "irm+pixel", "irm+pixel patch 8, fresh ends"]
    original, network = result["rows"]["original"], result["rows"]["irm+pixel"]
    assert original["pixel_error"] == 0
    assert original["leakage_cmc1"]["inside"]["image"]["share"] == 100
    assert network["samples_seen"] == 128
    assert not network["cut_short"]
    assert network["pixel_error"] > 0
    assert (out / "irm+pixel" / "weights" / "model.safetensors").is_file()
    assert len((out / "search.md").read_text().splitlines()) == 6
    before = (out / "irm+pixel" / "result.json").stat().st_mtime_ns
    (out / "pixelate_8" / "result.json").unlink()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (out / "irm+pixel" / "result.json").stat().st_mtime_ns == before
    resumed = json.loads((out / "search.json").read_text())["rows"]
    timeless = [{name: {**row, "measuring_seconds": 0} for name, row in rows.items()} for rows in (result["rows"], resumed)]
    assert timeless[0] == timeless[1]
