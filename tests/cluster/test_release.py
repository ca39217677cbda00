"""The release record: granted to what was measured, kept by a resumed run, gone when anything changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.dataset import Dataset, Labels, ShardData
from cluster.release import Evidence, grant, revoke
from cluster.shard import Sample, ShardWriter, sha256_hex
from cluster.store import StoreError
from cluster.verify import verify
from tests.cluster.test_verify import COMMIT, build

BOUND = {"mate": "image", "limit": 0.01, "upper": 0.004, "attacker": "alpha", "queries": 12, "cmc1": 0.001}
ATTACKER = {"name": "alpha", "adaptive": False, "reference": 0.9}
EVIDENCE = Evidence([BOUND], "s3://bucket/results/leakage.json", "e" * 64, "f", 12, [ATTACKER])
LINEAGE: dict[str, Any] = {"fingerprint": "f", "parent": None}


def finished_again(dataset: Dataset, lineage: dict[str, Any] = LINEAGE) -> dict[str, Any]:
    return dataset.finish("images", lineage, dataset.manifests())


@pytest.fixture
def dataset(any_root: str) -> Dataset:
    return build(any_root)


def test_a_release_carries_its_evidence_and_no_time(dataset: Dataset) -> None:
    before = dataset.description()
    grant(dataset, EVIDENCE)
    content, data = dataset.description(), dataset.store.get("dataset.json")
    measured = {"url": EVIDENCE.url, "sha256": EVIDENCE.sha256}
    index = sha256_hex(dataset.store.get("index.json"))
    release = {"bounds": [BOUND], "measured": measured, "fingerprint": "f", "attackers": [ATTACKER], "index_sha256": index}
    assert content == {**before, "released": True, "release": release}
    grant(dataset, EVIDENCE)
    assert dataset.store.get("dataset.json") == data
    assert verify(dataset.url).ok


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"samples": 11}])
def test_what_was_not_measured_is_not_released(dataset: Dataset, change: dict[str, Any]) -> None:
    data = dataset.store.get("dataset.json")
    with pytest.raises(StoreError, match=r"no longer the set that was measured .*Run `facemae leakage` again") as caught:
        grant(dataset, replace(EVIDENCE, **change))
    assert caught.value.fatal
    assert dataset.store.get("dataset.json") == data


@pytest.mark.parametrize("gone", [False, True])
def test_a_shard_put_over_by_another_is_not_released(dataset: Dataset, gone: bool) -> None:
    data, file = dataset.store.get("dataset.json"), next(manifest.file for manifest in dataset.manifests() if manifest.file)
    content = dataset.store.get(file)
    dataset.store.delete(file)
    if not gone:
        dataset.store.put(file, content + b"more")
    found = "no" if gone else len(content) + 4
    with pytest.raises(StoreError, match=rf"{re.escape(file)} has {found} bytes, {len(content)} were committed.*facemae verify"):
        grant(dataset, EVIDENCE)
    assert dataset.store.get("dataset.json") == data


def test_a_resumed_run_keeps_a_release(dataset: Dataset) -> None:
    for decide in (lambda: grant(dataset, EVIDENCE), lambda: revoke(dataset, "too much")):
        decide()
        data = dataset.store.get("dataset.json")
        assert finished_again(dataset)["release"]
        assert dataset.store.get("dataset.json") == data


def test_a_finished_run_started_again_keeps_a_release(make_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = make_dataset(str(tmp_path / "set"), "synthetic:ids=2,images=2")
    content = dataset.description()
    grant(dataset, replace(EVIDENCE, fingerprint=content["lineage"]["fingerprint"], samples=content["samples"]))
    data = dataset.store.get("dataset.json")
    make_dataset(str(tmp_path / "set"), "synthetic:ids=2,images=2")
    assert dataset.description()["released"] is True
    assert dataset.store.get("dataset.json") == data


def _other_pixels(dataset: Dataset) -> None:
    """The same keys, labels and sizes; only the pixels differ."""
    writer = ShardWriter()
    for number in range(4):
        writer.add(Sample(f"00002-{number:06d}", b"imago %d" % number * 99, 4 + number // 2))
    old = dataset.manifest("00002")
    dataset.store.delete("manifests/00002.json")
    dataset.store.delete(str(old.file))
    new = dataset.commit("00002", ShardData(writer.finish(), 4, Labels.of(writer.labels)), **COMMIT)
    assert (new.num_bytes, new.sha256 == old.sha256) == (old.num_bytes, False)


def test_a_changed_set_is_not_released(dataset: Dataset) -> None:
    grant(dataset, EVIDENCE)
    _other_pixels(dataset)
    assert finished_again(dataset)["released"] is False
    assert "release" not in dataset.description()
    grant(dataset, EVIDENCE)
    assert "release" not in finished_again(dataset, {**LINEAGE, "fingerprint": "g"})
    assert dataset.description()["released"] is False


def test_verify_finds_a_release_of_other_shards_or_without_evidence(tmp_path: Path) -> None:
    dataset = build(str(tmp_path / "set"))
    grant(dataset, EVIDENCE)
    released = dataset.description()
    _other_pixels(dataset)
    finished_again(dataset)
    for content, text in (
        (released, "changed after it was measured"),
        ({**dataset.description(), "released": True}, "without the evidence"),
    ):
        dataset.describe(content)
        assert [problem for problem in verify(dataset.url).problems if text in problem]
    assert finished_again(dataset)["released"] is False, "finishing does not believe it either"
    assert verify(dataset.url).ok


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"released": true, "release": 5}', b"\xff"])
def test_a_damaged_description_releases_nothing(tmp_path: Path, damaged: bytes) -> None:
    dataset = build(str(tmp_path / "set"))
    dataset.store.put("dataset.json", damaged)
    assert finished_again(dataset)["released"] is False
    assert json.loads(dataset.store.get("dataset.json")) == dataset.description()


def test_a_withheld_set_says_why(dataset: Dataset) -> None:
    grant(dataset, EVIDENCE)
    revoke(dataset, "3 % are above the limit of 1 %")
    content = dataset.description()
    assert (content["released"], content["release"]["withheld"]) == (False, "3 % are above the limit of 1 %")
    assert verify(dataset.url).ok


def test_a_set_with_new_keys_does_not_tell_where_it_was_measured(tmp_path: Path) -> None:
    dataset = build(str(tmp_path / "set"))
    finished_again(dataset, {**LINEAGE, "config": {"rekey": {"check": "0"}}})
    grant(dataset, EVIDENCE)
    assert dataset.description()["release"]["measured"] == {"sha256": EVIDENCE.sha256}
    assert b"s3://" not in dataset.store.get("dataset.json")


def test_a_set_that_is_unfinished_cannot_be_released(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no data set"):
        grant(Dataset(str(tmp_path)), EVIDENCE)
