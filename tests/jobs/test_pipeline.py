"""The product's spine, end to end on S3: ingest, pretrain, embed, train, protect, leakage, report, verify; then once more, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import yaml

from cluster.dataset import Dataset
from cluster.seaweedfs import Endpoint
from cluster.store import open_store
from jobs import pipeline
from jobs.command import UsageError, from_mapping
from jobs.pipeline import PipelineConfig
from jobs.protect import ProtectConfig, method_options

CONTENT = {
    "recognizer": "inside",
    "attackers": ["attacker"],
    "training": {"source": "synthetic:ids=12,images=8,seed=1", "shard_size": 48},
    "original": {"source": "synthetic:ids=10,images=6,seed=2", "shard_size": 30},
    "pretrain": {
        "inside": {"backbone": "compact-8", "dim": 128, "samples": 128, "batch_size": 32, "num_workers": 1},
        "attacker": {"backbone": "compact-plain-8", "dim": 128, "samples": 128, "batch_size": 32, "num_workers": 1},
    },
    "train": {"architecture": "facemae_tiny_patch16_112", "batch_size": 16, "samples": 48, "grid_every": 0, "num_workers": 1},
    "leakage": {"pixels": False},
    "num_workers": 1,
}


def _config(root: str, folder: str | Path, **changes: object) -> PipelineConfig:
    return from_mapping(PipelineConfig, {"root": root, "folder": str(folder), **CONTENT, **changes}, where="test", complete=True)


@pytest.mark.s3
@pytest.mark.timeout(600)
def test_the_whole_path_and_its_resume(
    s3_server: Endpoint,
    s3_root: str,
    ray_session: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _config(f"{s3_root}/sets", f"{s3_root}/results")  # nothing is local: so it runs on pods
    first = pipeline.run(config)
    assert "next:" not in capsys.readouterr().out, "a step does not tell what the pipeline does by itself"
    assert first["next"].startswith("open it in a browser")
    assert first["protect"]["samples_in"] == first["protect"]["samples"] == 60
    assert first["failed_shards"] == []
    results = open_store(f"{s3_root}/results/leakage")
    assert b"60" in results.get("report.html")
    report = json.loads(results.get("leakage.json"))
    assert report["protected"]["samples"] == 60
    lineage = Dataset(f"{s3_root}/sets/protected").description()["lineage"]
    assert lineage["parent"]["fingerprint"] == Dataset(f"{s3_root}/sets/original").description()["lineage"]["fingerprint"]
    manifests = {name: Dataset(f"{s3_root}/sets/{name}").manifests() for name in ("training", "original", "protected")}
    pipeline.run(config)
    assert {name: Dataset(f"{s3_root}/sets/{name}").manifests() for name in manifests} == manifests, "nothing was made twice"
    assert list(tmp_path.iterdir()) == [], "nothing was written here"
    _assert_nothing_leaks(s3_server.secret_key.encode(), s3_root)


def _assert_nothing_leaks(secret: bytes, root: str) -> None:
    store = Dataset(root).store
    for stored in store.list():
        data = store.get(stored.key)
        assert secret not in data, stored.key
        assert not stored.key.startswith("sets/protected/") or b"synthetic image" not in data, "an origin reached the protected set"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"losss": "mse"}}, "section train: unknown field 'losss'"),
        ({"original": {}}, "section original: the field 'source' is missing"),
        ({"attackers": ["inside"]}, "sits in the loss and attacks too"),
        ({"train": {"num_workers": 3}}, "section train: 3 workers do not divide 4 lanes: give num_workers: 2, or lanes: 3"),
        (
            {"pretrain": {"inside": {"num_workers": 16}, "attacker": {}}},
            "section pretrain inside: 16 workers do not divide 4 lanes: give num_workers: 4",
        ),
        ({"protect": {"method": "noise", "secret_seed": "a" * 64}}, "the secret is given by its place"),
    ],
)
def test_a_wrong_file_is_refused_before_the_first_step(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises((UsageError, ValueError), match=message):
        pipeline.run(_config(str(tmp_path / "root"), tmp_path, **changes))
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("workers", "section", "expected"),
    [
        (16, {}, 4),
        (3, {}, 2),
        (0, {}, 0),
        (16, {"lanes": 12, "batch_size": 240}, 12),
        (8, {"lanes": 12, "batch_size": 240}, 6),
        (16, {"num_workers": 1}, 1),
    ],
)
def test_a_training_takes_workers_that_divide_its_lanes(tmp_path: Path, workers: int, section: dict[str, int], expected: int) -> None:
    config = _config(str(tmp_path / "root"), tmp_path, num_workers=workers, train=section, pretrain={"inside": section, "attacker": {}})
    steps = {name: settings for name, _, settings in pipeline.plan(config)}
    assert getattr(steps["train"], "num_workers", None) == getattr(steps["pretrain inside"], "num_workers", None) == expected
    assert getattr(steps["protect"], "num_workers", None) == workers


def test_embed_has_a_section_of_its_own(tmp_path: Path) -> None:
    config = _config(str(tmp_path / "root"), tmp_path, embed={"device": "cuda", "gpus_per_worker": 0.5})
    steps = {name: settings for name, _, settings in pipeline.plan(config)}
    assert (getattr(steps["embed"], "device", ""), getattr(steps["embed"], "gpus_per_worker", 0)) == ("cuda", 0.5)
    assert getattr(steps["embed"], "input", "") == str(tmp_path / "root" / "training")


def test_the_demo_s_file_is_a_valid_pipeline(tmp_path: Path) -> None:
    content = yaml.safe_load((Path(pipeline.__file__).parent / "demo.yaml").read_text())
    steps = [name for name, _, _ in pipeline.plan(from_mapping(PipelineConfig, content, where="demo.yaml", complete=True))]
    assert steps[:2] == ["training", "pretrain inside"]
    assert steps[-1] == "verify protected"


def test_a_protection_without_weights_gets_none(tmp_path: Path) -> None:
    steps = {name: settings for name, _, settings in pipeline.plan(_config(str(tmp_path / "root"), tmp_path, protect={"method": "blur"}))}
    assert getattr(steps["protect"], "weights", "") is None
    assert method_options(cast(ProtectConfig, steps["protect"])) == {"strength": 4.0}
