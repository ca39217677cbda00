"""``facemae leakage`` from the command line to leakage.json, against brute force over the embeddings it wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.dataset import Dataset
from cluster.embedding import Embeddings, read_embeddings
from facemae.curve import Curve, depths
from facemae.leakage import Leakage
from jobs import embed, ingest, protect
from jobs.leakage import _report, main
from jobs.leakage_table import table_of

DIM = 24


def write_recognizer(path: Path, seed: int, name: str | None = None) -> Path:
    """A random projection of coarse pixels: enough to tell synthetic faces apart, and small."""
    weight = np.random.default_rng(seed).standard_normal((147, DIM)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 112, 112])]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIM])]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, [numpy_helper.from_array(weight, "weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    path.with_suffix(".json").write_text(json.dumps({"name": name or path.stem, "mean": [0.5] * 3, "std": [0.5] * 3}))
    return path


@pytest.fixture(scope="module")
def roots(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A synthetic original and its re-encoded copy, three shards of four identities each."""
    folder = tmp_path_factory.mktemp("sets")
    original, protected = str(folder / "original"), str(folder / "protected")
    ingest.run(ingest.IngestConfig(source="synthetic:ids=12,images=4", output=original, shard_size=16, num_workers=1))
    protect.run(protect.ProtectConfig(input=original, output=protected, method="none", num_workers=1))
    return original, protected


def embeddings(root: str, name: str) -> Embeddings:
    dataset = Dataset(root).embeddings(name)
    parts = [read_embeddings(dataset.read(manifest)) for manifest in dataset.manifests()]
    keys = [key for part in parts for key in part.keys]
    return Embeddings(keys, np.concatenate([p.identities for p in parts]), np.concatenate([p.vectors for p in parts]))


def hits(queries: Embeddings, gallery: Embeddings, *, other_images: bool, own: bool) -> list[int]:
    """Queries with a mate among the k nearest, at the depths of a curve, by sorting every similarity (ties for the attacker)."""
    scores = (queries.vectors.astype(np.float64) @ gallery.vectors.astype(np.float64).T).astype(np.float32)
    same_image = np.array(queries.keys)[:, None] == np.array(gallery.keys)
    mates = (queries.identities[:, None] == gallery.identities) & ~same_image if other_images else same_image
    if other_images or not own:
        scores[same_image] = -np.inf
    ranks = [1 + int(np.sum(row > row[mine].max())) for row, mine in zip(scores, mates, strict=True)]
    return [sum(rank <= k for rank in ranks) for k in depths(len(gallery.keys))]


def test_the_job_equals_brute_force(roots: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, protected = roots
    file, output = str(write_recognizer(tmp_path / "alpha.onnx", 0)), tmp_path / "leakage"
    command = ["--original", original, "--protected", protected, "--recognizer", file, "--output", str(output), "--num-workers", "1"]
    assert main(command) == 0
    report = json.loads((output / "leakage.json").read_bytes(), parse_constant=pytest.fail)
    assert (report["schema"], report["search"], report["worst_attacker"]) == (2, "exact", "alpha")
    assert report["protected"]["parent"]["fingerprint"] == report["original"]["fingerprint"]
    assert "none" in json.dumps(report["protected"]["config"])
    for attacker in report["attackers"]:
        _check_attacker(attacker, original, protected)
    attacker, pixels = report["attackers"]
    assert pixels["name"] == "pixels", "it attacks unless it is told not to"
    assert len(list((output / attacker["leakage"]["ranks"]).glob("*.parquet"))) == 3
    printed, first = capsys.readouterr().out, attacker["leakage"]["image"]
    assert f"{100 * first['cmc'][0]:.2f} [{100 * first['low'][0]:.2f}, {100 * first['high'][0]:.2f}]" in printed
    assert f"next:    facemae report --output {output}" in printed
    before = (output / "leakage.json").read_bytes()
    assert main(command) == 0
    assert (output / "leakage.json").read_bytes() == before, "a second run finds everything done and says the same"


def _check_attacker(attacker: dict[str, Any], original: str, protected: str) -> None:
    name = attacker["recognizer"]["name"]
    originals, copies = embeddings(original, name), embeddings(protected, name)
    leakage, reference, utility = (attacker[part] for part in ("leakage", "reference", "utility"))
    assert leakage["image"]["hits"] == hits(copies, originals, other_images=False, own=True)
    assert leakage["identity"]["hits"] == hits(copies, originals, other_images=True, own=True)
    assert reference["identity"]["hits"] == hits(originals, originals, other_images=True, own=False)
    assert utility["identity"]["hits"] == hits(copies, copies, other_images=True, own=False)
    assert reference["image"] is None
    assert utility["image"] is None
    assert leakage["image"]["cmc"][0] > 0.9, "re-encoding protects nobody"
    assert (leakage["images"], leakage["queries"], leakage["left_out"], leakage["gallery"]) == (48, 48, 0, 48)
    assert leakage["identity"]["chance"][0] == pytest.approx(3 / 47)
    assert sum(leakage["histograms"]["mate"]) == 48


def test_the_worst_attacker_leads() -> None:
    def attacker(name: str, image: int, identity: int, left_out: int = 0) -> dict[str, Any]:
        labels = np.arange(40) // 2
        found = [np.where(np.arange(40) < hits, 1, 40) for hits in (image, identity)]
        curves = [Curve.of(ranks, labels, 50, others) for ranks, others in zip(found, (None, labels), strict=True)]
        none = Curve.of(np.full(40, -1), labels, 50)
        leakage, reference = Leakage(curves[0], curves[1]).to_json(50), Leakage(none, none).to_json(50)
        exact = {"search": "exact"}
        searches = {"leakage": {**leakage, **exact, "left_out": left_out}, "reference": reference | exact, "utility": reference | exact}
        return {"name": name, "recognizer": {"name": name}, "adaptive": None, **searches}

    sets = {"original": {"samples": 50}, "protected": {"samples": 40}}
    report = _report(sets, [attacker("mild", 2, 9), attacker("worst", 4, 3, left_out=7), attacker("weak", 2, 1)])
    assert [one["name"] for one in report["attackers"]] == ["worst", "mild", "weak"]
    assert report["worst_attacker"] == "worst"
    lines = list(table_of(report))
    # both images of two people in twenty: Wilson's interval of 2 in 20
    assert re.search(r"^worst +the same image +10\.00 \[2\.79, 30\.10\] +10\.00 +10\.00 +2\.00 +-$", lines[2])
    assert "no identity has two images" in lines[4]
    assert any(line.startswith("worst: 7 protected images have no rank") for line in lines)


def test_other_protections_stand_beside(long: None, roots: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, protected = roots
    file = str(write_recognizer(tmp_path / "alpha.onnx", 0))
    command = [
        "--original",
        original,
        "--protected",
        protected,
        "--recognizer",
        file,
        "--num-workers",
        "1",
        "--no-adaptive",
        "--no-pixels",
        "--output",
    ]
    assert main([*command, str(tmp_path / "first")]) == 0
    assert main([*command, str(tmp_path / "second"), "--beside", str(tmp_path / "first")]) == 0
    first, second = (json.loads((tmp_path / name / "leakage.json").read_bytes()) for name in ("first", "second"))
    (other,) = second["beside"]
    assert other["protection"]["method"] == "none"
    assert other["attackers"][0]["image"]["cmc"] == first["attackers"][0]["leakage"]["image"]["cmc"][0]
    assert "beside: none by alpha, CMC@1 %: image 100.00" in capsys.readouterr().out
    first["original"]["fingerprint"] = "another"
    (tmp_path / "first" / "leakage.json").write_text(json.dumps(first))
    assert main([*command, str(tmp_path / "third"), "--beside", str(tmp_path / "first")]) == 2
    assert "is of other originals" in capsys.readouterr().err


def test_errors_are_one_clear_line(roots: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, protected = roots
    file = str(write_recognizer(tmp_path / "alpha.onnx", 0))
    same = str(write_recognizer(tmp_path / "beta.onnx", 1, name="alpha"))
    command = ["--output", str(tmp_path / "leakage"), "--num-workers", "1", "--original"]

    def error(*arguments: str) -> str:
        assert main([*command, *arguments]) == 2
        return capsys.readouterr().err.strip().rpartition("\n")[2]

    assert "was made from" in error(protected, "--protected", protected, "--recognizer", file)
    assert "each of another name" in error(original, "--protected", protected, "--recognizer", file, same)
    assert "no data set" in error(str(tmp_path / "nothing"), "--protected", protected, "--recognizer", file)
    renamed = str(write_recognizer(tmp_path / "gamma.onnx", 0, name="gamma"))
    twice = error(original, "--protected", protected, "--recognizer", file, renamed)
    assert "alpha is the network of another one under a new name" in twice
    assert "was made from no data set" in error(original, "--protected", original, "--recognizer", file), "strangers are traced to nobody"
    command[1] = f"{protected}/leakage"
    assert "lie in each other" in error(original, "--protected", protected, "--recognizer", file)
    assert not (tmp_path / "leakage").exists()
    assert not (Path(protected) / "leakage").exists()


def test_embeddings_of_another_file_are_refused(roots: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, protected = roots
    embed.run(embed.EmbedConfig(input=original, recognizer=str(write_recognizer(tmp_path / "gamma.onnx", 0)), num_workers=1))
    other = str(write_recognizer(tmp_path / "other.onnx", 1, name="gamma"))
    output = str(tmp_path / "leakage")
    assert main(["--original", original, "--protected", protected, "--output", output, "--num-workers", "1", "--recognizer", other]) == 2
    assert "another recogniser of the same name" in capsys.readouterr().err
