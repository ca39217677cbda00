"""``facemae protect --repair`` against brute force: who is exposed, what is copied, what is kept and what is given up."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

import facemae.model  # noqa: F401  # registers the architectures
from cluster.dataset import Dataset
from cluster.measurement import Measurement
from cluster.picture import decode
from cluster.shard import Sample, read_samples
from cluster.verify import verify
from facemae.recognizer.onnx import OnnxRecognizer
from jobs import ingest, leakage, protect
from jobs.repair import _recognizers
from tests.jobs.test_leakage_job import write_recognizer
from tests.jobs.test_rekey import SECRET, new_key
from tests.training import initial

RANK = 6
"""Of 32 originals: a gallery so small has hardly anybody at rank 1 by chance."""
PLACES = ("weights", "input", "repair", "output")


def samples(root: str) -> dict[str, Sample]:
    """Every sample by key."""
    dataset = Dataset(root)
    data = (dataset.read(manifest) for manifest in dataset.manifests() if manifest.file)
    return {item.key: item for shard in data for item in read_samples(shard) if isinstance(item, Sample)}


def given_up(root: str) -> dict[str, str]:
    """Key and evidence of what could not be protected."""
    dataset = Dataset(root)
    rows = [row for manifest in dataset.manifests() for row in dataset.ledger(manifest)]
    assert {row.reason for row in rows} <= {"cannot-be-protected"}
    return {row.key: row.error for row in rows}


def exposed(original: Mapping[str, Sample], protected: Mapping[str, Sample], file: str, rank: int, names: Any = str) -> set[str]:
    """Keys of the protected images whose original is at this rank or better, by sorting every similarity."""
    recognizer = OnnxRecognizer.load(file)

    def embed(pictures: Mapping[str, Sample]) -> np.ndarray:
        stack = np.stack([decode(sample.image) for sample in pictures.values()])
        return recognizer.embed(stack).astype(np.float16).astype(np.float64)

    scores = (embed(protected) @ embed(original).T).astype(np.float32)
    places = {names(key): place for place, key in enumerate(original)}
    return {key for key, row in zip(protected, scores, strict=True) if np.sum(row > row[places[key]]) < rank}


def save_weights(folder: Path, scale: float) -> None:
    """Untrained weights. Scaled up, their output hangs on the mask: some images are traced with one mask and not with another."""
    model = initial()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale if weight.ndim > 1 else 1)
    model.save_pretrained(folder)


class World:
    """Originals, an attacker, and the flags that every run shares."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.original = folder, str(folder / "original")
        self.file = str(write_recognizer(folder / "alpha.onnx", 0))
        save_weights(folder / "weights", 8)
        (folder / "secret").write_text(SECRET)
        ingest.run(ingest.IngestConfig(source="synthetic:ids=8,images=4", output=self.original, shard_size=16, num_workers=1))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def protect(self, output: str, **options: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"weights": self.path("weights"), "device": "cpu", "num_workers": 1, **options}
        return protect.run(protect.ProtectConfig(input=self.original, output=self.path(output), **settings))

    def measure(self, protected: str, output: str, rekey: str | None = None) -> dict[str, Any]:
        roots: dict[str, Any] = {"original": self.original, "protected": self.path(protected), "output": self.path(output)}
        leakage.run(leakage.LeakageConfig(**roots, recognizer=[self.file], pixels=False, num_workers=1, rekey=rekey))
        return json.loads((self.folder / output / "leakage.json").read_text())

    def repair(self, results: str, output: str, **options: Any) -> dict[str, Any]:
        given = {"repair": self.path(results), "recognizer": [self.file], "repair_rank": RANK, **options}
        return self.protect(output, **given)

    def bytes_of(self, name: str) -> dict[str, str | None]:
        return {manifest.shard: manifest.sha256 for manifest in Dataset(self.path(name)).manifests()}


@pytest.fixture(scope="module")
def world(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A protected set, its measurement, and the repair of it."""
    world = World(tmp_path_factory.mktemp("repair"))
    world.protect("protected", seed=5)
    world.measure("protected", "results")
    world.repair("results", "repaired", num_workers=2)
    return world


def test_what_nobody_traces_is_copied_and_what_is_kept_is_traced_by_nobody(world: World) -> None:
    original, before, after = (samples(world.path(name)) for name in ("original", "protected", "repaired"))
    traced = exposed(original, before, world.file, RANK)
    lost = given_up(world.path("repaired"))
    assert 0 < len(traced) < len(before), "the case has both kinds"
    assert set(after) == set(before) - set(lost)
    assert set(lost) < traced, "and some can be protected"
    assert {key: bytes(after[key].image) for key in after if key not in traced} == {
        key: bytes(before[key].image) for key in before if key not in traced
    }
    repaired = traced - set(lost)
    assert all(bytes(after[key].image) != bytes(before[key].image) for key in repaired)
    assert list(after) == [key for key in before if key in after]
    assert exposed(original, after, world.file, RANK) == set()
    assert all(after[key].identity == before[key].identity for key in after)


def test_the_counts_and_the_lineage_tell_what_was_done(world: World) -> None:
    dataset, measured = Dataset(world.path("repaired")), Dataset(world.path("protected")).description()
    content, manifests = dataset.description(), dataset.manifests()
    totals = {name: sum(manifest.counts.get(name, 0) for manifest in manifests) for m in manifests for name in m.counts}
    repaired = sum(count for name, count in totals.items() if name.startswith("repaired_"))
    assert (totals["copied"] + totals["exposed"], content["samples_in"]) == (32, 32)
    assert (totals["copied"] + repaired, totals["exposed"] - repaired) == (content["samples"], content["quarantined"])
    assert content["lineage"]["parent"] == measured["lineage"]["parent"]
    config = content["lineage"]["config"]
    assert config["protection"] == measured["lineage"]["config"]["protection"]
    assert (config["repair"]["of"], config["repair"]["rank"], config["repair"]["skip"]) == (measured["lineage"]["fingerprint"], RANK, 0)
    rounds = [(each["seed"], each["mask_ratio"]) for each in config["repair"]["rounds"]]
    assert rounds == [(6, 0.75), (7, 0.75), (8, 0.75), (9, 0.75), (10, 0.8), (11, 0.85), (12, 0.9), (13, 0.95)]
    assert [each["name"] for each in config["repair"]["attackers"]] == ["alpha"]
    assert verify(world.path("repaired")).ok


def test_the_same_bytes_on_one_worker_after_an_interruption_of_two(world: World) -> None:
    shutil.copytree(world.path("repaired"), world.path("stopped"))
    for name in ("dataset.json", "manifests/00001.json"):
        (Path(world.path("stopped")) / name).unlink()
    world.repair("results", "stopped")
    assert world.bytes_of("stopped") == world.bytes_of("repaired")
    assert {m.attempt for m in Dataset(world.path("stopped")).manifests()} == {1, 2}
    assert verify(world.path("stopped")).ok


@pytest.fixture(scope="module")
def measured_again(world: World) -> dict[str, Any]:
    return world.measure("repaired", "results-repaired")["attackers"][0]["leakage"]["image"]


def test_a_repaired_set_is_measured_like_any_other(long: None, world: World, measured_again: dict[str, Any]) -> None:
    lost, before = given_up(world.path("repaired")), samples(world.path("protected"))
    assert measured_again["queries"] == len(before) - len(lost)
    assert measured_again["hits"][RANK - 1] == 0
    assert measured_again["hits"][9] > 0, "a wider rank has something to repair"


def test_a_repaired_set_is_repaired_like_any_other(long: None, world: World, measured_again: dict[str, Any]) -> None:
    world.repair("results-repaired", "again", repair_rank=10)
    config = Dataset(world.path("again")).description()["lineage"]["config"]
    assert (config["repair"]["skip"], config["repair"]["rounds"][0]["seed"]) == (8, 14), "no mask comes twice"
    assert config["repair"]["before"]["of"] == Dataset(world.path("protected")).description()["lineage"]["fingerprint"]
    original, last = samples(world.original), samples(world.path("again"))
    assert exposed(original, last, world.file, 10) == set()
    assert verify(world.path("again")).ok


def test_new_keys_stay_new(long: None, world: World) -> None:
    secret = f"file:{world.path('secret')}"
    world.protect("released", seed=5, rekey=secret)
    world.measure("released", "results-released", rekey=secret)
    world.repair("results-released", "released-repaired", rekey=secret)
    original, before, after = (samples(world.path(name)) for name in ("original", "released", "released-repaired"))
    traced = exposed(original, before, world.file, RANK, new_key)
    assert traced
    assert exposed(original, after, world.file, RANK, new_key) == set()
    assert set(after) | set(given_up(world.path("released-repaired"))) == set(map(new_key, original))
    assert {key for key in after if bytes(after[key].image) != bytes(before[key].image)} == traced & set(after)
    for file in Path(world.path("released-repaired")).rglob("*"):
        data = file.read_bytes() if file.is_file() else b""
        assert [key for key in original if key.encode() in data] == []
        assert world.original.encode() not in data
    with pytest.raises(ValueError, match="were replaced for a release: give --rekey"):
        world.repair("results-released", "without")


def test_what_has_nothing_to_vary_is_given_up(long: None, world: World) -> None:
    world.protect("plain", method="none")
    world.measure("plain", "results-plain")
    summary = world.repair("results-plain", "nothing", repair_rank=1)
    lost = given_up(world.path("nothing"))
    assert set(lost) == exposed(samples(world.original), samples(world.path("plain")), world.file, 1)
    assert len(lost) > 28
    assert set(lost.values()) == {"traced at rank 1 or better, and none has nothing to vary"}
    assert summary["quarantined"] == len(lost)
    assert verify(world.path("nothing")).ok


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 6}, "--seed 6, but .* was made with 5: leave --seed out"),
        ({"mask_ratio": 0.5}, "--mask-ratio 0.5, but .* was made with 0.75"),
        ({"method": "none"}, "--method none, but .* was made with facemae"),
        ({"recognizer": []}, "--recognizer lacks alpha"),
        ({"repair_rank": 11}, "--repair-rank 11: give 1 to 10"),
        ({"rekey": "file:secret"}, "were not replaced: leave out --rekey"),
        ({"weights": "other"}, "has sha256 .*, the measured set was made with .*: give these"),
        ({"input": "protected"}, "is not the original set of"),
        ({"repair": "protected"}, "holds no leakage.json"),
        ({"output": "original/x"}, "lie in each other"),
    ],
)
def test_what_does_not_fit_the_measured_set_is_refused(world: World, changes: dict[str, Any], text: str) -> None:
    if "weights" in changes and not Path(world.path("other")).exists():
        save_weights(Path(world.path("other")), 2)
    settings: dict[str, Any] = {"input": world.original, "output": world.path("refused"), "repair": world.path("results")}
    settings |= {"weights": world.path("weights"), "device": "cpu", "num_workers": 1, "recognizer": [world.file]}
    settings |= {name: world.path(value) if name in PLACES else value for name, value in changes.items()}
    settings["rekey"] = f"file:{world.path('secret')}" if "rekey" in changes else None
    with pytest.raises((ValueError, RuntimeError), match=text):
        protect.run(protect.ProtectConfig(**settings))
    assert not (Path(world.path("refused")) / "manifests").exists()


def test_a_set_that_changed_since_is_not_repaired(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.path("results"), tmp_path / "results")
    file = tmp_path / "results" / "leakage.json"
    report = json.loads(file.read_text())
    report["protected"]["fingerprint"] = "other"
    file.write_text(json.dumps(report))
    with pytest.raises(RuntimeError, match=r"is no longer what .* measured: run facemae leakage again"):
        world.repair(str(tmp_path / "results"), "refused")


def test_pixels_attacks_a_repair_without_a_file_and_others_need_theirs(tmp_path: Path) -> None:
    def measured(*files: str) -> Measurement:
        attackers = [{"recognizer": OnnxRecognizer.load(file).describe()} for file in files]
        return cast(Measurement, SimpleNamespace(attackers=attackers, url="results"))

    alpha = str(write_recognizer(tmp_path / "alpha.onnx", 0))
    config = protect.ProtectConfig(input="in", output="out", recognizer=[alpha])
    assert [each.name for each in _recognizers(config, measured(alpha, "pixels"))] == ["alpha", "pixels"]
    with pytest.raises(ValueError, match="--recognizer lacks alpha: a repair needs the very files"):
        _recognizers(dataclasses.replace(config, recognizer=[]), measured(alpha, "pixels"))
