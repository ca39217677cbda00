from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.io import encode_jpeg

from benchmarks.search import pack, run, settings
from benchmarks.search.bundle import MAX_BYTES, read_bundle, write_bundle
from benchmarks.search.learn import Faces, begin, embed, train
from benchmarks.search.measure import area, best_threshold, leakage, utility, verification
from benchmarks.search.packed import PackedRecognizer
from benchmarks.search.table import record, table
from facemae.model import to_tensor
from facemae.recognizer.onnx import OnnxRecognizer
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
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *tail])
        for name, tail in (("input", [3, 112, 112]), ("embedding", [16]))
    ]
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
    run.main(command[3:])
    assert (out / "irm+pixel" / "result.json").stat().st_mtime_ns == before
    resumed = json.loads((out / "search.json").read_text())["rows"]
    timeless = [{name: {**row, "measuring_seconds": 0} for name, row in rows.items()} for rows in (result["rows"], resumed)]
    assert timeless[0] == timeless[1]


def test_the_packed_recogniser_is_the_onnx_one_with_its_gradient(packed: Path) -> None:
    onnx_recognizer = OnnxRecognizer.load(packed.parent / "inside.onnx")
    bundle = read_bundle(packed)
    pictures = bundle.train.decode()
    torch.testing.assert_close(
        embed(bundle.recognizer, pictures), torch.from_numpy(onnx_recognizer.embed(pictures.numpy())), atol=1e-4, rtol=0
    )
    direction = torch.randn(len(pictures), 16, generator=torch.Generator().manual_seed(0))
    gradients = []
    for network in (bundle.recognizer, onnx_recognizer.differentiable()):
        images = to_tensor(pictures).requires_grad_()
        (network(images)[0] * direction).sum().backward()
        assert images.grad is not None
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-3)


def test_layers_of_the_packed_recogniser_are_its_last_maps(packed: Path) -> None:
    recognizer = read_bundle(packed).recognizer
    recognizer.layers = (-3,)
    embedding, layer = recognizer(torch.zeros(2, 3, 112, 112))
    assert (embedding.shape, layer.shape) == ((2, 16), (2, 8 * 7 * 7))


def test_an_unknown_operator_or_a_missing_weight_is_refused() -> None:
    step = {"op": "conv", "inputs": ["input"], "weights": ["w"], "output": "a"}
    for wrong in ({**step, "op": "eval"}, {**step, "inputs": ["nothing"]}, step):
        with pytest.raises(ValueError, match="pack it again"):
            PackedRecognizer([wrong], {}, [0.5] * 3, [0.5] * 3)
    model = graph()
    model.graph.node[6].op_type = "Softmax"
    with pytest.raises(ValueError, match="Softmax"):
        pack.unfold(model.SerializeToString())


def test_a_changed_foreign_or_unvouched_file_is_refused(packed: Path, tmp_path: Path) -> None:
    data, file = bytearray(packed.read_bytes()), tmp_path / "search.safetensors"
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(FileNotFoundError, match="sha256 is missing"):
        read_bundle(file)
    with pytest.raises(ValueError, match="damaged or another file"):
        read_bundle(file, read_bundle(packed).sha256)
    with pytest.raises(FileNotFoundError, match="absent is missing"):
        read_bundle(tmp_path / "absent", "0")
    file.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_bundle(file, sha256(b"\x80\x04pickle").hexdigest())
    save_file({"train.data": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="has schema None"):
        read_bundle(file, sha256(file.read_bytes()).hexdigest())


def test_a_bundle_with_parts_that_do_not_fit_is_refused(packed: Path, tmp_path: Path) -> None:
    with safe_open(packed, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    changes: list[tuple[str, Tensor, str]] = [
        ("pairs", torch.tensor([[0, 99, 1]]), "name pictures that are not there"),
        ("test.people", torch.tensor([0]), "pictures, ends and people of test"),
        ("train.data", torch.zeros_like(tensors["train.data"]), "picture 0 of the bundle"),
    ]
    for name, tensor, message in changes:
        write_bundle(tmp_path / "wrong", {**tensors, name: tensor}, facts)
        with pytest.raises(ValueError, match=message):
            read_bundle(tmp_path / "wrong").train.decode()
    del tensors["protected.ends"]
    write_bundle(tmp_path / "wrong", tensors, facts)
    with pytest.raises(ValueError, match=r"lacks 'protected.ends'"):
        read_bundle(tmp_path / "wrong")
    with pytest.raises(ValueError, match="the limit is 64"):
        write_bundle(tmp_path / "large", {"train.data": torch.zeros(MAX_BYTES, dtype=torch.uint8)}, facts)
    assert not (tmp_path / "large").exists()


def test_nobody_may_be_trained_on_and_tested_with(packed: Path) -> None:
    with pytest.raises(ValueError, match="are in train and in test"):
        pack.main([*arguments(packed.parent, output="other"), "--test-folds", "1"])
    with pytest.raises(ValueError, match="check --train-folds"):
        pack.main([*arguments(packed.parent, output="other"), "--train-folds", "3"])


def test_people_left_out_are_not_packed(packed: Path) -> None:
    (packed.parent / "doubt.csv").write_text("a,b\nprotected1,train2\n")
    pack.main([*arguments(packed.parent, output="fewer"), "--leave-out", str(packed.parent / "doubt.csv")])
    fewer, all_people = read_bundle(packed.parent / "fewer").train, read_bundle(packed).train
    assert (len(fewer), len(all_people)) == (6, 8)
    assert fewer.people.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(read_bundle(packed.parent / "fewer").protected) == 6


def test_leakage_and_utility_are_the_shares_that_a_plain_search_finds() -> None:
    generator = np.random.default_rng(0)
    people = np.repeat(np.arange(12), 3)
    original = generator.normal(size=(36, 8)) + 2 * generator.normal(size=(12, 8))[people]
    redrawn = original + 1.5 * generator.normal(size=(36, 8))
    original, redrawn = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (original, redrawn))
    image = identity = worth = 0
    for row in range(36):
        order = sorted(range(36), key=lambda other: -float(redrawn[row] @ original[other]))
        image += order[0] == row
        identity += people[next(other for other in order if other != row)] == people[row]
        beside = sorted(range(36), key=lambda other: -float(redrawn[row] @ redrawn[other]))
        worth += people[next(other for other in beside if other != row)] == people[row]
    found = leakage(torch.tensor(redrawn), torch.tensor(original), people)
    assert (found["image"]["share"], found["identity"]["share"]) == (round(100 * image / 36, 2), round(100 * identity / 36, 2))
    assert utility(torch.tensor(redrawn), people)["share"] == round(100 * worth / 36, 2)
    assert 0 < found["image"]["low"] < found["image"]["share"] < found["image"]["high"] < 100


def test_the_threshold_is_the_best_of_all_and_the_area_counts_pairs() -> None:
    generator = np.random.default_rng(1)
    same = generator.random(60) < 0.5
    scores = np.round(generator.normal(size=60) + same, 3)
    best = max(((scores >= threshold) == same).mean() for threshold in [*scores, np.inf])
    assert ((scores >= best_threshold(scores, same)) == same).mean() == best
    wins = [(left > right) + (left == right) / 2 for left in scores[same] for right in scores[~same]]
    assert area(scores, same) == round(float(np.mean(wins)), 4)
    assert best_threshold(np.array([1.0, 0.5]), np.array([False, False])) == np.inf


def test_verification_judges_each_fold_by_the_threshold_of_the_other() -> None:
    """Brightness as the embedding's angle: in fold 0 the same people differ less than in fold 1, so its threshold costs fold 1 a pair."""

    class Angle(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            angle = images.mean((1, 2, 3))
            return torch.stack([angle.cos(), angle.sin()], 1)

    brightness = [100, 104, 100, 150, 100, 140, 100, 180]
    pictures = torch.tensor(brightness, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 112, 112, 3)
    folds, pairs = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([[0, 1, 1], [2, 3, 0], [4, 5, 1], [6, 7, 0]])
    found = verification(Angle(), pictures, folds, pairs)
    assert (found["accuracy"], found["area"], found["pairs"]) == (75.0, 1.0, 4)
    assert verification(Angle(), pictures, np.zeros(8, np.int64), pairs)["accuracy"] == 100.0


def test_every_setting_of_every_table_can_be_built() -> None:
    for grid in settings.GRIDS.values():
        assert len({run.folder_of(setting.name) for setting in grid}) == len(grid)
        for setting in grid:
            assert setting.loss().pixel or setting.loss().relation
            assert setting.people * 4 <= setting.batch
    sizes = {(setting.patch, setting.size, *setting.decoder.items()) for grid in settings.GRIDS.values() for setting in grid}
    assert len(sizes) == 4


def test_a_start_of_other_sizes_is_refused_and_fresh_ends_are_fresh() -> None:
    start = settings.Setting("start").network().state_dict()
    with pytest.raises(ValueError, match='pack --start, or start="random"'):
        begin(settings.Setting("eight", patch=8), start)
    with pytest.raises(ValueError, match="weights are missing"):
        begin(settings.Setting("none"), {})
    fresh = begin(settings.Setting("eight", patch=8, start="fresh ends"), start).state_dict()
    torch.testing.assert_close(fresh["encoder_blocks.0.attn.qkv.weight"], start["encoder_blocks.0.attn.qkv.weight"], atol=0, rtol=0)
    assert fresh["decoder_head.weight"].shape != start["decoder_head.weight"].shape


def test_a_training_without_time_stops_early_and_says_how_far_it_came(packed: Path) -> None:
    bundle = read_bundle(packed)
    pictures = bundle.train.decode()
    both = torch.stack([embed(bundle.recognizer, pictures)] * 2)
    faces = Faces(pictures, bundle.train.people.numpy(), both)
    setting = settings.Setting("short", batch=8, people=2, samples=800, start="random")
    assert train(setting, {}, faces, bundle.recognizer, False, until=0.0).samples == 80


def test_an_unknown_setting_and_results_of_another_bundle_are_refused(packed: Path, tmp_path: Path) -> None:
    command = ["--bundle", str(packed), "--output", str(tmp_path), "--settings", "ablation", "--device", "cpu"]
    with pytest.raises(ValueError, match="there are"):
        run.main([*command, "--only", "mse", "magic"])
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "result.json").write_text('{"bundle": "0123"}')
    with pytest.raises(ValueError, match="give another --output"):
        run.main([*command, "--only", "start", "--recognizer-samples", "16", "--width", "4"])


def test_the_ablation_on_the_page_of_results_is_the_recorded_one() -> None:
    repository = Path(__file__).parents[2]
    found = json.loads((repository / "benchmarks" / "search" / "ablation.json").read_text())
    shown = json.loads((repository / "docs" / "results" / "ablation.json").read_text())
    assert record(found, shown["title"]) == shown, "python -m benchmarks.search.table"
    assert table(found["rows"]).count("\n") == len(found["rows"]) + 2
