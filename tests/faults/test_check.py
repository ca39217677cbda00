"""The check itself: it passes a sound data set and fails on each way in which one can be broken."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.config import Config

from tests.faults.check import Snapshot, assert_same, compare, snapshot

pytestmark = pytest.mark.faults

SAMPLES = [[(f"{shard}{i:03}", bytes([shard, i]) * 50, shard) for i in range(5)] for shard in range(3)]
REJECTED = [[], [("1bad", "undecodable", 1), ("1worse", "bad-label", 1)], []]


def tar_of(samples: list[tuple[str, bytes, int]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for key, image, label in samples:
            for name, body in ((f"{key}.jpg", image), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return sink.getvalue()


def parquet_of(rows: list[tuple[str, str, int]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"key": key, "reason": reason, "num_samples": number} for key, reason, number in rows]), sink)
    return sink.getvalue()


class Written:
    """A data set in a folder, and the means to break it so that everything but the break is consistent."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for shard, samples in enumerate(SAMPLES):
            self.commit(shard, samples, REJECTED[shard])
        self.finish()

    def path(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def manifest(self, shard: int) -> dict[str, Any]:
        return json.loads(self.path(f"manifests/{shard:05}.json").read_bytes())

    def edit(self, shard: int, **fields: Any) -> None:
        self.path(f"manifests/{shard:05}.json").write_text(json.dumps({**self.manifest(shard), **fields}))

    def tar(self, shard: int) -> Path:
        return self.root / self.manifest(shard)["file"]

    def commit(self, shard: int, samples: list[tuple[str, bytes, int]], rejected: list[tuple[str, str, int]], data: bytes = b"") -> None:
        """Write a shard, its ledger and a manifest that fits; ``data`` replaces the tar."""
        data = data or tar_of(samples)
        digest = hashlib.sha256(data).hexdigest()
        name, ledger = f"shards/{shard:05}-{digest[:12]}.tar", f"quarantine/{shard:05}.parquet" if rejected else None
        self.path(name).write_bytes(data)
        ledger_bytes = parquet_of(rejected)
        if ledger:
            self.path(ledger).write_bytes(ledger_bytes)
        labels = [label for _, _, label in samples]
        manifest = {
            "shard": f"{shard:05}", "file": name, "sha256": digest, "num_bytes": len(data), "ledger": ledger,
            "ledger_sha256": hashlib.sha256(ledger_bytes).hexdigest() if ledger else None,
            "samples": len(samples), "quarantined": len(rejected), "samples_in": len(samples) + len(rejected),
            "identities": {"count": len(set(labels)), "first": min(labels), "last": max(labels)},
        }  # fmt: skip
        self.path(f"manifests/{shard:05}.json").write_text(json.dumps(manifest))

    def recommit(self, shard: int, samples: list[tuple[str, bytes, int]], data: bytes = b"") -> None:
        self.tar(shard).unlink()
        self.commit(shard, samples, REJECTED[shard], data)
        self.finish()

    def finish(self) -> None:
        manifests = [json.loads(path.read_bytes()) for path in sorted((self.root / "manifests").iterdir())]
        sums = {name: sum(m[name] for m in manifests) for name in ("samples", "samples_in", "quarantined")}
        total = {**sums, "bytes": sum(m["num_bytes"] for m in manifests), "shards": len(manifests)}
        self.path("dataset.json").write_text(json.dumps(total))
        shards = [{"url": m["file"], "nsamples": m["samples"], "filesize": m["num_bytes"]} for m in manifests]
        self.path("index.json").write_text(json.dumps({"shardlist": shards}))


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path / "root")


@pytest.fixture
def whole(tmp_path: Path) -> Snapshot:
    return snapshot(str(Written(tmp_path / "undisturbed").root))


def test_a_sound_data_set_passes(written: Written, whole: Snapshot):
    written.path("attempts/00001.json").write_text("{}")
    written.path("embeddings/r/dataset.json").write_text("{}")
    written.path("embeddings/r/shards/1.parquet").write_text("another data set's")
    tally = assert_same(str(written.root), whole)
    assert (tally.objects, tally.samples, tally.problems) == (9, 15, [])
    assert whole.ledger == {"1bad": ("undecodable", 1), "1worse": ("bad-label", 1)}
    assert whole.samples["2004"] == {"jpg": hashlib.sha256(bytes([2, 4]) * 50).hexdigest(), "cls": hashlib.sha256(b"2").hexdigest()}


def flip(path: Path, offset: int = 600) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def write(name: str) -> Callable[[Written], Any]:
    return lambda w: w.path(name).write_bytes(b"x")


def without_labels(samples: list[tuple[str, bytes, int]]) -> bytes:
    return tar_of(samples).replace(f"{samples[1][0]}.cls".encode(), f"{samples[1][0]}.clx".encode())


BREAKS: dict[str, tuple[str, Callable[[Written], Any]]] = {
    "a sample is lost": ("lost", lambda w: w.recommit(0, SAMPLES[0][1:])),
    "a shard is lost with its manifest": ("lost", lambda w: (w.tar(2).unlink(), w.path("manifests/00002.json").unlink(), w.finish())),
    "a row of the ledger is lost": ("lost", lambda w: (w.commit(1, SAMPLES[1], REJECTED[1][:1]), w.finish())),
    "a key is in two shards": ("doubled", lambda w: w.recommit(2, [*SAMPLES[2], SAMPLES[0][0]])),
    "a key is twice in one tar": ("doubled", lambda w: w.recommit(0, [*SAMPLES[0], SAMPLES[0][0]])),
    "a key is in a shard and in the ledger": ("doubled", lambda w: w.recommit(1, [*SAMPLES[1], ("1bad", b"i", 1)])),
    "a row is twice in the ledger": ("doubled", lambda w: (w.commit(1, SAMPLES[1], [*REJECTED[1], REJECTED[1][0]]), w.finish())),
    "a shard is committed twice under two names": ("doubled", lambda w: (w.commit(3, SAMPLES[0], []), w.finish())),
    "a byte of a picture is flipped": ("torn", lambda w: flip(w.tar(1))),
    "a tar is cut short": ("torn", lambda w: w.tar(1).write_bytes(w.tar(1).read_bytes()[:3000])),
    "a tar is empty": ("torn", lambda w: w.tar(1).write_bytes(b"")),
    "a tar is gone": ("torn", lambda w: w.tar(1).unlink()),
    "a tar was torn before it was hashed": ("wrong", lambda w: w.recommit(1, SAMPLES[1], tar_of(SAMPLES[1])[:3000])),
    "a sample has no label": ("torn", lambda w: w.recommit(0, SAMPLES[0], without_labels(SAMPLES[0]))),
    "a ledger is cut short": ("torn", lambda w: w.path("quarantine/00001.parquet").write_bytes(b"PAR1")),
    "a ledger is gone": ("torn", lambda w: w.path("quarantine/00001.parquet").unlink()),
    "a ledger is another one": ("torn", lambda w: w.path("quarantine/00001.parquet").write_bytes(parquet_of(REJECTED[1][::-1]))),
    "a manifest is empty": ("torn", lambda w: w.path("manifests/00001.json").write_bytes(b"")),
    "dataset.json is not there": ("torn", lambda w: w.path("dataset.json").unlink()),
    "a picture is another one": ("changed", lambda w: w.recommit(0, [("0000", b"other", 0), *SAMPLES[0][1:]])),
    "a label is another one": ("changed", lambda w: w.recommit(0, [(*SAMPLES[0][0][:2], 7), *SAMPLES[0][1:]])),
    "a key came in that was not there": ("changed", lambda w: w.recommit(0, [*SAMPLES[0], ("0new", b"i", 0)])),
    "a reason is another one": ("changed", lambda w: w.commit(1, SAMPLES[1], [("1bad", "failed-shard", 1), REJECTED[1][1]])),
    "a tar that no manifest names": ("strays", write("shards/00001-0123456789ab.tar")),
    "a ledger that no manifest names": ("strays", write("quarantine/00000.parquet")),
    "an unfinished write": ("strays", write("shards/.tmp-0123")),
    "a probe": ("strays", write(".probe-0123")),
    "something beside the attempts": ("strays", write("attempts/00001.json.bak")),
    "an embedding set without end": ("strays", write("embeddings/r/shards/00000-0123456789ab.parquet")),
    "the ledger's sum": ("wrong", lambda w: w.edit(1, quarantined=1)),
    "samples in": ("wrong", lambda w: w.edit(0, samples_in=6)),
    "the labels' summary": ("wrong", lambda w: w.edit(0, identities={"count": 2, "first": 0, "last": 1})),
    "the totals": ("wrong", lambda w: w.path("dataset.json").write_text('{"samples": 14}')),
    "the index": ("wrong", lambda w: w.path("index.json").write_text('{"shardlist": []}')),
}


@pytest.mark.parametrize("what", BREAKS)
def test_the_check_fails_where(what: str, written: Written, whole: Snapshot):
    column, damage = BREAKS[what]
    damage(written)
    tally = compare(str(written.root), whole)
    assert tally.numbers()[column] > 0, tally.problems
    with pytest.raises(AssertionError, match=column):
        assert_same(str(written.root), whole)


@pytest.mark.parametrize("what", [what for what, (column, _) in BREAKS.items() if column not in ("lost", "changed")])
def test_no_snapshot_is_taken_where(what: str, written: Written):
    """What is wrong in itself cannot become the measure for others."""
    BREAKS[what][1](written)
    with pytest.raises(AssertionError):
        snapshot(str(written.root))


@pytest.mark.s3
def test_the_check_reads_a_bucket(written: Written, whole: Snapshot, s3_root: str):
    s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    for path in written.root.rglob("*.*"):
        s3.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(written.root)}")
    assert assert_same(s3_root, whole).objects == 9
    s3.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/shards/00001-0123456789ab.tar")
    assert compare(s3_root, whole).problems == ["strays: the unfinished upload of shards/00001-0123456789ab.tar"]
    s3.delete_object(Bucket=bucket, Key=f"{prefix}/{written.manifest(0)['file']}")
    s3.put_object(Bucket=bucket, Key=f"{prefix}/.probe-1", Body=b"")
    tally = compare(s3_root, whole)
    assert (tally.lost, tally.torn, tally.strays) == (5, 1, 2)
