"""``facemae evaluate`` from the command line to evaluate.json, on drawn faces and recognisers that were never trained."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from cluster.picture import decode, encode
from cluster.seaweedfs import Endpoint
from cluster.store import open_store
from facemae.recognizer.compact import CompactNet
from facemae.recognizer.export import export_onnx
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.synthetic import SyntheticFaces
from jobs.evaluate import EvaluateConfig, main, run
from tests.facemae.test_pairs import write_cfp
from tests.jobs.test_leakage_job import DIM, write_recognizer

PEOPLE, IMAGES = 12, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """faces/PERSON/IMAGE.jpg, a list of all pairs of them, two recognisers."""
    root = tmp_path_factory.mktemp("world")
    pictures = SyntheticFaces(PEOPLE, IMAGES).render(np.arange(PEOPLE * IMAGES))
    names = [f"person{i // IMAGES:02d}/{i % IMAGES}.jpg" for i in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        (root / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "faces" / name).write_bytes(encode(picture))
    rows = [f"{a},{b},{int(a.split('/')[0] == b.split('/')[0])}" for a, b in combinations(names, 2)]
    order = np.random.default_rng(0).permutation(len(rows))
    (root / "all.csv").write_text("\n".join(["image_a,image_b,same", *(rows[i] for i in order)]) + "\n")
    torch.manual_seed(0)
    export_onnx(CompactNet(dim=16, width=4), root / "toy.onnx")
    write_recognizer(root / "other.onnx", 1)
    return root


def flags(world: Path, output: Path, *more: str) -> list[str]:
    return ["--recognizer", str(world / "toy.onnx"), "--output", str(output), "--threads", "1", *more]


def listed(world: Path, output: Path, *more: str) -> list[str]:
    return flags(world, output, "--pairs", str(world / "all.csv"), "--images", str(world / "faces"), *more)


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()[-1]


def vectors(world: Path, model: str, flip: bool) -> dict[str, np.ndarray]:
    """Embeddings by name, one picture at a time."""
    recognizer = OnnxRecognizer.load(world / model)
    found = dict[str, np.ndarray]()
    for path in sorted((world / "faces").glob("*/*.jpg")):
        picture = decode(path.read_bytes())[None]
        row = recognizer.features(picture)[0].astype(np.float64)
        if flip:
            row = row + recognizer.features(picture[:, :, ::-1])[0]
        found[path.relative_to(world / "faces").as_posix()] = row / np.linalg.norm(row)
    return found


@pytest.mark.parametrize("flip", [True, False])
def test_the_job_equals_a_plain_reading_of_the_list(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flip: bool) -> None:
    command = listed(world, tmp_path, *([] if flip else ["--no-flip"]), "--batch-size", "7")
    command[1:2] = [str(world / "toy.onnx"), str(world / "other.onnx")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "evaluate.json").read_text())
    assert (report["flip"], report["images"], report["std"]) == (flip, PEOPLE * IMAGES, "population")
    assert [result["recognizer"] for result in report["results"]] == ["toy", "other"]
    rows = [line.split(",") for line in (world / "all.csv").read_text().splitlines()[1:]]
    for result in report["results"]:
        by_name = vectors(world, f"{result['recognizer']}.onnx", flip)
        distances = np.array([((by_name[a] - by_name[b]) ** 2).sum() for a, b, _ in rows])
        same = np.array([value == "1" for _, _, value in rows])
        area = np.mean([np.sum(distances[~same] > d) for d in distances[same]]) / np.sum(~same)
        assert (result["genuine"], result["impostor"]) == (same.sum(), (~same).sum())
        assert result["auc"] == pytest.approx(area, abs=1e-4)
        assert result["tar_at_far"]["1e-2"] == pytest.approx(
            np.mean(distances[same] < np.sort(distances[~same])[np.sum(~same) // 100]), abs=0.03
        )
        assert 0.5 < result["accuracy"] <= 1
        assert len(result["by_fold"]["accuracy"]) == result["folds"] == 10
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "evaluate.md").read_text().strip() in shown
    assert "| all      | toy " in shown


def test_nothing_of_the_originals_is_written(world: Path, tmp_path: Path) -> None:
    assert main(listed(world, tmp_path, "--identification", str(world / "faces"))) == 0
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for word in (b"person", b".jpg", str(world).encode(), str(tmp_path).encode()):
        assert word not in written, word
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluate.json", "evaluate.md", "roc.png"]


def test_a_bin_file_gives_the_figures_of_its_list(world: Path, tmp_path: Path) -> None:
    rows = [line.split(",") for line in (world / "all.csv").read_text().splitlines()[1:]]
    content = [(world / "faces" / name).read_bytes() for a, b, _ in rows for name in (a, b)], [value == "1" for _, _, value in rows]
    (tmp_path / "faces.bin").write_bytes(pickle.dumps(content, 4))
    report = run(
        EvaluateConfig(
            recognizer=[str(world / "toy.onnx")],
            output=str(tmp_path / "out"),
            bin=[str(tmp_path / "faces.bin")],
            pairs=[str(world / "all.csv")],
            images=str(world / "faces"),
        )
    )
    different = ("protocol", "kind", "seconds")
    one, other = ({name: value for name, value in result.items() if name not in different} for result in report["results"])
    assert one == other
    assert [protocol["images"] for protocol in report["protocols"]] == [PEOPLE * IMAGES] * 2, "an image given many times counts once"


def test_a_bin_file_that_is_none(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, marker = tmp_path / "lfw.bin", tmp_path / "executed"
    command = flags(world, tmp_path / "out", "--bin", str(file))
    file.write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    assert "lfw.bin: not read: at byte 0" in fails(capsys, command)
    assert not marker.exists()
    image = next((world / "faces").glob("*/*.jpg")).read_bytes()
    good = pickle.dumps(([image, b"x", b"y", b"z"], [True, False]), 4)
    file.write_bytes(good[:-40])
    assert "lfw.bin: no verification file: not a whole pickle" in fails(capsys, command)
    file.write_bytes(pickle.dumps(([], []), 4))
    assert "lfw.bin holds no pair" in fails(capsys, command)
    file.write_bytes(good)
    assert "lfw.bin: 2 pairs cannot be cut into 10 folds" in fails(capsys, command)
    file.write_bytes(pickle.dumps(([image, *(b"no picture %d" % i for i in range(19))], [True, False] * 5), 4))
    assert "lfw.bin, image 1: no JPEG, PNG, WebP or BMP" in fails(capsys, command)
    assert not (tmp_path / "out").exists(), "nothing was written"


def test_one_against_many(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces, others = tmp_path / "faces", tmp_path / "others"
    shutil.copytree(world / "faces", faces)
    (faces / "person00" / "1.jpg").unlink()
    (faces / "person00" / "2.jpg").unlink()
    shutil.copy(faces / "person01" / "0.jpg", faces / "stray.jpg")
    others.mkdir()
    for i, picture in enumerate(SyntheticFaces(4, 1, seed=5).render(np.arange(4))):
        (others / f"{i}.jpg").write_bytes(encode(picture))
    more = ["--identification", str(faces), "--distractors", str(others), "--no-flip"]
    assert main(flags(world, tmp_path / "out", *more)) == 0
    result = json.loads((tmp_path / "out" / "evaluate.json").read_text())["results"][0]
    assert (result["protocol"], result["gallery"], result["probes"]) == ("faces-identification", PEOPLE - 1, (PEOPLE - 1) * (IMAGES - 1))
    assert (result["single_image_identities"], result["distractors"], result["strangers"]) == (1, 5, 5)
    by_name = {name: row.astype(np.float16).astype(np.float64) for name, row in vectors(world, "toy.onnx", flip=False).items()}
    recognizer = OnnxRecognizer.load(world / "toy.onnx")
    strangers = recognizer.embed(np.stack([decode(path.read_bytes()) for path in sorted(others.iterdir())])).astype(np.float64)
    gallery = {name: row for name, row in by_name.items() if name.endswith("/0.jpg")}
    ranks = []
    for name, row in by_name.items():
        if not name.endswith("/0.jpg") and not name.startswith("person00"):
            mate = row @ gallery[f"{name.split('/')[0]}/0.jpg"]
            ranks.append(sum(row @ other >= mate for other in [*gallery.values(), *strangers]))
    assert result["rank1"] == pytest.approx(np.mean(np.array(ranks) == 1), abs=0.05)
    assert result["rank5"] == pytest.approx(np.mean(np.array(ranks) <= 5), abs=0.05)
    printed = capsys.readouterr()
    assert "1 identities have one image" in printed.out
    assert "1 files beside the folders of identities are left out" in printed.err
    assert not (tmp_path / "out" / "roc.png").exists()


def test_templates(world: Path, tmp_path: Path) -> None:
    rows, pairs = ["template,subject,image,media"], ["t1,t2,same"]
    for p in range(PEOPLE):
        rows += [f"g{p},{p},person{p:02d}/0.jpg,", f"q{p},{p},person{p:02d}/1.jpg,v", f"q{p},{p},person{p:02d}/2.jpg,v"]
        pairs += [f"g{p},q{other},{int(p == other)}" for other in range(PEOPLE)]
    lists = {"templates": rows, "matches": pairs, "gallery": ["template", *(f"g{p}" for p in range(PEOPLE - 2))]}
    for name, lines in lists.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    more = [
        f"--templates={tmp_path}/templates.csv",
        f"--template-pairs={tmp_path}/matches.csv",
        f"--template-gallery={tmp_path}/gallery.csv",
    ]
    assert main(flags(world, tmp_path / "out", "--images", str(world / "faces"), *more)) == 0
    pair, search = json.loads((tmp_path / "out" / "evaluate.json").read_text())["results"]
    assert (pair["kind"], pair["genuine"], pair["impostor"], pair["accuracy"]) == ("template-pairs", PEOPLE, PEOPLE * (PEOPLE - 1), None)
    assert (search["kind"], search["gallery"]) == ("template-identification", PEOPLE - 2)
    assert (search["probes"], search["probes_without_mate"], search["templates"]) == (PEOPLE - 2, 4, 2 * PEOPLE)
    by_name = vectors(world, "toy.onnx", flip=True)
    pooled = [by_name[f"person{p:02d}/1.jpg"] + by_name[f"person{p:02d}/2.jpg"] for p in range(PEOPLE)]
    scores = np.array([[by_name[f"person{p:02d}/0.jpg"] @ row / np.linalg.norm(row) for row in pooled] for p in range(PEOPLE)])
    genuine, impostor = np.diag(scores), scores[~np.eye(PEOPLE, dtype=bool)]
    assert pair["auc"] == pytest.approx(np.mean(genuine[:, None] > impostor), abs=1e-3)


def test_cfp(world: Path, tmp_path: Path) -> None:
    root = write_cfp(tmp_path / "cfp")
    for person, source in ((1, "person01"), (2, "person02"), (3, "person03")):
        for i, name in enumerate(("frontal/01", "frontal/02", "profile/01")):
            path = root / "Data" / "Images" / f"{person:03d}" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(world / "faces" / source / f"{i}.jpg", path)
    assert main(flags(world, tmp_path / "out", "--cfp", str(root), "--cfp-protocols", "FP", "FF")) == 0
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert [(result["protocol"], result["pairs"], result["folds"]) for result in report["results"]] == [
        ("cfp_fp", 30, 10),
        ("cfp_ff", 20, 10),
    ]
    assert report["images"] == 9


def test_images_that_are_absent(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = tmp_path / "faces"
    shutil.copytree(world / "faces", faces)
    (faces / "person03" / "1.jpg").unlink()
    (faces / "person04" / "0.jpg").write_bytes(b"no picture")
    command = flags(world, tmp_path / "out", "--pairs", str(world / "all.csv"), "--images", str(faces))
    message = fails(capsys, command)
    assert "all: 1 of the 36 images that it names are absent, the first: " in message
    assert "person03/1.jpg" in message
    assert "--skip-missing" in message
    assert main([*command, "--skip-missing"]) == 0
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert [report["protocols"][0][name] for name in ("images", "images_absent", "images_unreadable")] == [36, 1, 1]
    assert report["images"] == 34
    assert (report["results"][0]["pairs"], report["results"][0]["pairs_left_out"]) == (34 * 33 // 2, 35 + 34)
    assert "all: left out 1 absent and 1 unreadable images, and with them 69 pairs." in capsys.readouterr().out
    shutil.copy(world / "faces" / "person03" / "1.jpg", faces / "person03")
    assert f"{faces}/person04/0.jpg: no JPEG, PNG, WebP or BMP picture. Leave it out with --skip-missing" in fails(capsys, command)


def test_pictures_of_another_size(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = tmp_path / "faces"
    shutil.copytree(world / "faces", faces)
    (faces / "person04" / "0.jpg").write_bytes(encode(np.zeros((200, 160, 3), np.uint8)))
    command = flags(world, tmp_path / "out", "--pairs", str(world / "all.csv"), "--images", str(faces))
    message = fails(capsys, command)
    assert "person04/0.jpg: 160 x 200 pixels, not 112 x 112: align the faces first. Leave it out" in message
    assert "--resize" in message
    assert main([*command, "--resize"]) == 0


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "nothing": (lambda w: [], "nothing to measure"),
    "no root": (lambda w: ["--pairs", f"{w}/all.csv"], "give it with --images"),
    "no templates": (lambda w: ["--template-pairs", f"{w}/all.csv"], "--templates"),
    "distractors alone": (
        lambda w: ["--pairs", f"{w}/all.csv", "--images", f"{w}/faces", "--distractors", f"{w}/faces"],
        "give that folder too",
    ),
    "distractors twice": (lambda w: ["--identification", f"{w}/faces", "--distractors", f"{w}/faces"], "nobody who is searched for"),
    "no such list": (lambda w: ["--pairs", f"{w}/gone.csv", "--images", f"{w}/faces"], "gone.csv"),
    "no such folder": (lambda w: ["--pairs", f"{w}/all.csv", "--images", f"{w}/gone"], "does not exist, or holds no file"),
    "no text": (lambda w: ["--pairs", f"{w}/toy.onnx", "--images", f"{w}/faces"], "is no text"),
    "twice": (lambda w: ["--pairs", f"{w}/all.csv", f"{w}/all.csv", "--images", f"{w}/faces"], "two lists are named 'all'"),
    "output among the images": (
        lambda w: ["--pairs", f"{w}/all.csv", "--images", f"{w}/faces", "--output", f"{w}/faces/out"],
        "lies in --images",
    ),
    "batch": (lambda w: ["--pairs", f"{w}/all.csv", "--images", f"{w}/faces", "--batch-size", "0"], "give 1 or more"),
    "two of one name": (
        lambda w: ["--identification", f"{w}/faces", "--recognizer", f"{w}/toy.onnx", f"{w}/toy.onnx"],
        "each of another name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    more, message = BAD[case]
    assert message in fails(capsys, flags(world, tmp_path / "out", *more(world)))
    assert not (tmp_path / "out").exists(), "nothing was written"


def test_pairs_of_one_kind_only(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.evaluate.embed_images", lambda *given: pytest.fail("refused too late"))
    lines = (world / "all.csv").read_text().splitlines()
    (tmp_path / "same.csv").write_text("\n".join(line for line in lines if not line.endswith(",0")) + "\n")
    command = flags(world, tmp_path / "out", "--pairs", str(tmp_path / "same.csv"), "--images", str(world / "faces"))
    assert "same.csv: all 36 pairs show one person" in fails(capsys, command)
    (tmp_path / "templates.csv").write_text("template,subject,image,media\na,0,person00/0.jpg,\nb,1,person01/0.jpg,\n")
    (tmp_path / "others.csv").write_text("t1,t2,same\na,b,0\n")
    more = [f"--templates={tmp_path}/templates.csv", f"--template-pairs={tmp_path}/others.csv", "--images", str(world / "faces")]
    assert "others.csv: all 1 pairs show two people" in fails(capsys, flags(world, tmp_path / "out", *more))


def test_a_recogniser_that_gives_nonsense(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(write_recognizer(tmp_path / "nan.onnx", 0))
    model.graph.initializer[0].raw_data = np.full((147, DIM), np.nan, np.float32).tobytes()
    onnx.save(model, tmp_path / "nan.onnx")
    command: list[Any] = listed(world, tmp_path / "out")
    command[1] = str(tmp_path / "nan.onnx")
    assert "embeddings by nan are zero or not finite" in fails(capsys, command)


@pytest.mark.s3
def test_images_and_results_on_s3(world: Path, s3_server: Endpoint, s3_root: str) -> None:
    store = open_store(s3_root)
    for path in sorted((world / "faces").glob("*/*.jpg")):
        store.put(f"faces/{path.relative_to(world / 'faces').as_posix()}", path.read_bytes())
    store.put("all.csv", (world / "all.csv").read_bytes())
    command = ["--recognizer", str(world / "toy.onnx"), "--output", f"{s3_root}/out", "--pairs", f"{s3_root}/all.csv"]
    assert main([*command, "--images", f"{s3_root}/faces"]) == 0
    assert json.loads(store.get("out/evaluate.json"))["images"] == PEOPLE * IMAGES
