"""Verify says yes to a sound set, and names whatever was done to another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import attempt
from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, Manifest, ShardData
from cluster.embedding import Embeddings, write_embeddings
from cluster.local import LocalStore
from cluster.s3 import S3Store
from cluster.shard import Rejected, Sample, ShardWriter, write_ledger
from cluster.store import StoreError
from cluster.verify import Verification, clean, verify

COMMIT: dict[str, Any] = {"fingerprint": "f", "attempt": Attempt("run", 1), "seconds": {}}


def build(root: str, *, doubled: str | None = None, parent: dict | None = None) -> Dataset:
    """Three shards of four samples, two identities each, and one quarantined file in the second."""
    dataset = Dataset(root)
    for shard in range(3):
        writer = ShardWriter()
        for number in range(4):
            key = f"{shard:05d}-{number:06d}"
            writer.add(Sample(doubled if doubled and number == 3 else key, b"image %d" % number * 99, 2 * shard + number // 2))
        rejected = [Rejected("00001-000004", "not-an-image", "text", 5)] if shard == 1 else []
        dataset.commit(f"{shard:05d}", ShardData(writer.finish(), 4, Labels.of(writer.labels), rejected), **COMMIT)
    dataset.finish("images", {"fingerprint": "f", "parent": parent}, dataset.manifests())
    return dataset


@pytest.fixture
def dataset(any_root: str) -> Dataset:
    return build(any_root)


def test_a_sound_set_is_ok(dataset: Dataset):
    found = verify(dataset.url)
    assert found.ok
    assert (found.problems, found.strays, found.kind, found.identities) == ([], [], "images", 6)
    assert found.totals == {name: dataset.description()[name] for name in found.totals}
    assert (found.totals["samples_in"], found.totals["samples"], found.totals["quarantined"]) == (13, 12, 1)


def edited(dataset: Dataset, shard: str, **changes: object) -> None:
    manifest = replace(dataset.manifest(shard), **changes)  # type: ignore[arg-type]
    dataset.store.put(f"manifests/{shard}.json", manifest.to_bytes())


def flip(dataset: Dataset, key: str | None, at: int) -> None:
    assert key is not None
    data = bytearray(dataset.store.get(key))
    data[at] ^= 1
    dataset.store.put(key, bytes(data))


def rewrite(dataset: Dataset, key: str, **changes: object) -> None:
    dataset.store.put(key, json.dumps({**json.loads(dataset.store.get(key)), **changes}).encode())


def swap(dataset: Dataset) -> None:
    first, second = dataset.manifests()[:2]
    one, two = dataset.read(first), dataset.read(second)
    dataset.store.put(str(first.file), two)
    dataset.store.put(str(second.file), one)


def file_of(dataset: Dataset, shard: str) -> str:
    return str(dataset.manifest(shard).file)


def ledger_of(dataset: Dataset) -> str:
    return str(dataset.manifest("00001").ledger)


DAMAGE: dict[str, tuple[Callable[[Dataset], None], str]] = {
    "deleted shard": (lambda d: d.store.delete(file_of(d, "00002")), "00002"),
    "changed byte in a picture": (lambda d: flip(d, file_of(d, "00000"), 520), "00000"),
    "changed byte in the padding": (lambda d: flip(d, file_of(d, "00000"), -1), "00000"),
    "cut shard": (lambda d: d.store.put(file_of(d, "00001"), d.store.get(file_of(d, "00001"))[:-512]), "00001"),
    "two shards exchanged": (swap, "00001"),
    "samples edited in a manifest": (lambda d: edited(d, "00001", samples=5), "4 samples in the file, 5 in the manifest"),
    "input edited in a manifest": (lambda d: edited(d, "00001", samples_in=6), "do not add up"),
    "identities edited in a manifest": (lambda d: edited(d, "00001", identities=Labels(1, 2, 3)), "labels"),
    "labels shifted in a manifest": (lambda d: edited(d, "00000", identities=Labels(2, 7, 8)), "labels"),
    "quarantine edited in a manifest": (lambda d: edited(d, "00001", quarantined=2, samples_in=6), "1 samples in the quarantine"),
    "quarantine struck from a manifest": (lambda d: edited(d, "00001", quarantined=0, samples_in=4), "1 samples in the quarantine"),
    "ledger struck from a manifest": (lambda d: edited(d, "00001", ledger=None), "0 samples in the quarantine"),
    "bytes edited in a manifest": (lambda d: edited(d, "00001", num_bytes=1), "00001"),
    "missing manifest": (lambda d: d.store.delete("manifests/00001.json"), "manifests say"),
    "missing ledger": (lambda d: d.store.delete(ledger_of(d)), "quarantine/00001"),
    "ledger that is no parquet": (lambda d: d.store.put(ledger_of(d), b"rows"), "00001"),
    "ledger cut short": (lambda d: d.store.put(ledger_of(d), d.store.get(ledger_of(d))[:-9]), "00001"),
    "empty ledger": (lambda d: d.store.put(ledger_of(d), write_ledger([])), "is not what its manifest says"),
    "missing dataset.json": (lambda d: d.store.delete("dataset.json"), "unfinished"),
    "damaged dataset.json": (lambda d: d.store.put("dataset.json", b"{"), "dataset.json"),
    "dataset.json of another schema": (lambda d: rewrite(d, "dataset.json", schema=99), "schema 99"),
    "count edited in dataset.json": (lambda d: rewrite(d, "dataset.json", samples=11), "samples = 11"),
    "bytes edited in dataset.json": (lambda d: rewrite(d, "dataset.json", bytes=0), "bytes = 0"),
    "missing index.json": (lambda d: d.store.delete("index.json"), "index.json"),
    "edited index.json": (lambda d: rewrite(d, "index.json", shardlist=[]), "index.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage: str):
    dataset = build(str(tmp_path))
    harm, word = DAMAGE[damage]
    before = {stored.key: dataset.store.get(stored.key) for stored in dataset.store.list()}
    harm(dataset)
    found = verify(dataset.url)
    assert not found.ok
    assert any(word in problem for problem in found.problems), found.problems
    for key, data in before.items():
        dataset.store.put(key, data)
    assert verify(dataset.url).ok  # it was this and nothing else


def test_damage_is_named_on_s3_too(s3_root: str):
    dataset = build(s3_root)
    flip(dataset, dataset.manifest("00000").file, 520)
    dataset.store.delete(str(dataset.manifest("00001").file))
    dataset.store.put("shards/00009-abc.tar", b"")
    found = verify(s3_root)
    assert [word in problem for problem, word in zip(found.problems, ("00000", "00001"), strict=True)] == [True, True]
    assert found.strays == ["shards/00009-abc.tar"]


@pytest.mark.parametrize(
    "key", ["shards/00001-0123456789ab.tar", "shards/deep/x", "notes.txt", "quarantine/00000.parquet", "None", "manifests/x.tmp"]
)
def test_a_stray_object_is_named(tmp_path, key: str):
    dataset = build(str(tmp_path))
    dataset.store.put(key, b"stray")
    found = verify(dataset.url)
    assert (found.problems, found.strays, found.ok) == ([], [key], False)


def test_a_key_in_two_shards_is_counted(any_root: str):
    found = verify(build(any_root, doubled="same").url)
    assert found.problems == ["1 keys occur more than once"]


def test_a_key_twice_in_one_shard_is_counted(tmp_path):
    dataset = Dataset(str(tmp_path))
    writer = ShardWriter()
    for _ in range(2):
        writer.add(Sample("same", b"image", 1))
    dataset.commit("00000", ShardData(writer.finish(), 2, Labels.of([1])), **COMMIT)
    dataset.finish("images", {}, dataset.manifests())
    assert verify(dataset.url).problems == ["1 keys occur more than once"]


def test_a_sample_that_cannot_be_used_is_a_problem(tmp_path):
    import io
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    dataset = Dataset(str(tmp_path))
    dataset.commit("00000", ShardData(file.getvalue(), 1, Labels()), **COMMIT)
    dataset.finish("images", {}, dataset.manifests())
    (problem,) = verify(dataset.url).problems
    assert "no .cls member" in problem


def test_an_unfinished_set_is_no_sound_one(any_root: str):
    found = verify(any_root)
    assert (found.ok, found.kind) == (False, "unfinished")
    assert "holds no data set" in found.problems[0]


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    dataset = build(str(tmp_path))
    dataset.store.put("manifests/00001.json", b"{")
    found = verify(dataset.url)
    assert "manifests/00001.json is not a manifest" in found.problems[0]
    assert found.totals["samples_in"] == 8


def test_the_parents_samples_must_all_have_come_in(tmp_path):
    parent = build(str(tmp_path / "parent"))
    entry = {"url": parent.url, "fingerprint": "f", "samples": 12}
    child = Dataset(str(tmp_path / "child"))
    for manifest in parent.manifests()[:2]:
        child.commit(manifest.shard, ShardData(parent.read(manifest), 4, manifest.identities), **COMMIT)
    child.finish("images", {"parent": entry}, child.manifests())
    (problem,) = verify(child.url).problems
    assert "holds 12 samples, 8 came in here" in problem
    last = parent.manifests()[2]
    child.commit(last.shard, ShardData(parent.read(last), 4, last.identities), **COMMIT)
    child.finish("images", {"parent": entry}, child.manifests())
    assert verify(child.url).ok
    parent.store.delete("dataset.json")
    assert verify(child.url).ok  # the parent is out of reach


def embedded(dataset: Dataset, labels: list[int]) -> Verification:
    rows = Embeddings([f"k{i}" for i in range(4)], np.array(labels), np.eye(4, dtype=np.float16))
    below = dataset.embeddings("toy")
    below.commit("00000", ShardData(write_embeddings(rows), 4, Labels.of([0, 0, 1, 1])), **COMMIT)
    below.finish("embeddings", {}, below.manifests())
    return verify(below.url, ".parquet")


def test_embeddings_are_verified_in_their_own_right(tmp_path):
    dataset = build(str(tmp_path))
    found = embedded(dataset, [0, 0, 1, 1])
    assert (found.ok, found.kind, found.identities) == (True, "embeddings", 2)
    assert verify(dataset.url).ok  # and are no strays above
    manifest: Manifest = dataset.embeddings("toy").manifest("00000")
    flip(dataset.embeddings("toy"), manifest.file, 100)
    assert not verify(dataset.embeddings("toy").url, ".parquet").ok


def test_embeddings_with_other_labels_are_a_problem(tmp_path):
    assert not embedded(build(str(tmp_path)), [0, 0, 1, 2]).ok


# --- tidying up ---


def litter(dataset: Dataset) -> set[str]:
    """What killed attempts leave: a tar and a ledger whose shard was committed with others, a probe, a write cut short."""
    left = {"shards/00001-0123456789ab.tar", "quarantine/00001-0123456789ab.parquet", ".probe-0123"}
    for key in left:
        dataset.store.put(key, b"left over")
    if isinstance(dataset.store, LocalStore):
        (dataset.store.root / "shards" / ".tmp-0123").write_bytes(b"half")
        left.add("shards/.tmp-0123")
    else:
        assert isinstance(dataset.store, S3Store)
        key = "shards/00001-ba9876543210.tar"
        dataset.store._client.create_multipart_upload(Bucket=dataset.store.bucket, Key=dataset.store._full(key))
        left.add(key)
    return left


def test_cleaning_removes_what_dead_attempts_left_and_nothing_else(any_root: str):
    dataset = build(any_root)
    mine = {"notes.txt", "shards/00009-0123456789ab.tar", "shards/00001.tar"}  # a user's, and one of a shard that may yet be committed
    for key in mine:
        dataset.store.put(key, b"mine")
    before = {stored.key: dataset.store.get(stored.key) for stored in dataset.store.list()}
    left = litter(dataset)
    found = verify(any_root)
    assert set(found.strays) | {each.key for each in found.unfinished} == left | mine
    assert set(clean(any_root)) == left
    assert {stored.key: dataset.store.get(stored.key) for stored in dataset.store.list()} == before
    assert set(verify(any_root).strays) == mine
    assert clean(any_root) == []


def test_cleaning_waits_for_the_living(any_root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempt, "BEAT_SECONDS", 0.1)
    dataset = build(any_root)
    left = litter(dataset)
    with attempt.attempting(dataset.store, "f"), pytest.raises(StoreError, match="attempt 1 is at work"):
        clean(any_root)
    assert set(clean(any_root)) == left


def test_an_object_that_was_committed_since_the_listing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A driver that was stopped for longer than anybody's patience commits between our listing and our look at the shard."""
    dataset = build(str(tmp_path))
    late = dataset.manifest("00002")
    dataset.store.delete("manifests/00002.json")
    real = Dataset.committed

    def committed(self: Dataset, shard: str) -> Manifest | None:
        if shard == "00002":
            self.publish(late)
        return real(self, shard)

    monkeypatch.setattr(Dataset, "committed", committed)
    assert clean(str(tmp_path)) == []
    assert verify(str(tmp_path)).ok


def test_shards_that_were_given_up_are_named(tmp_path: Path):
    dataset = build(str(tmp_path))
    given_up = [Rejected("00003", "failed-shard", "out of memory", 0, None, 3)]
    dataset.commit("00003", ShardData(None, 0, Labels(), given_up, failure="out of memory"), **COMMIT)
    dataset.finish("images", {"parent": None}, dataset.manifests())
    found = verify(str(tmp_path))
    assert found.ok
    assert found.given_up == {"00003": "out of memory"}
