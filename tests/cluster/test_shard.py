"""Our shard writer and reader against tarfile and webdataset: which members make a sample, and the ledger of what was left out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import shard
from cluster.shard import Rejected, Sample, ShardError, ShardWriter, read_ledger, sha256_hex, write_ledger
from tests.tars import foreign_tar, read, some, write

names = st.text(st.characters(exclude_characters="/.\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
keys = st.builds("/".join, st.lists(names, min_size=1, max_size=3)).filter(lambda key: len(key.encode()) <= 95)
samples_lists = st.lists(
    st.builds(
        Sample, keys, st.binary(min_size=1, max_size=1200), st.integers(0, 2**63 - 1), st.none() | st.text(st.characters(codec="utf-8"))
    ),
    unique_by=lambda sample: sample.key,
    max_size=6,
)


# --- written by us, read by others ---


@given(samples_lists)
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read_back_by_us_and_by_tarfile(samples: list[Sample]):
    data = write(samples)
    assert read(data) == samples
    expected: dict[str, bytes | memoryview] = {}
    for sample in samples:
        expected |= {f"{sample.key}.jpg": sample.image, f"{sample.key}.cls": b"%d" % sample.identity}
        if sample.source is not None:
            expected[f"{sample.key}.json"] = json.dumps({"source": sample.source}).encode()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = tar.getmembers()
        found = {info.name: tar.extractfile(info).read() for info in infos}  # type: ignore[union-attr]
    assert found == expected
    assert list(found) == list(expected)
    for info in infos:
        assert (info.isreg(), info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (True, 0, 0, 0, "", "", 0o644)


def test_webdataset_and_a_torch_loader_read_it(tmp_path: Path):
    samples = [Sample(f"00000-{i:06d}", bytes([i]) * 700, i // 3, f"person {i}/ü.jpg") for i in range(7)]
    for part in (0, 1):
        (tmp_path / f"0000{part}-abc.tar").write_bytes(write(samples[4 * part : 4 * part + 4]))
    urls = [str(path) for path in sorted(tmp_path.iterdir())]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("torch", handler=webdataset.reraise_exception, only=["cls", "json"])
    found = list(dataset)
    assert [(s["__key__"], s["jpg"], s["cls"], s["json"]["source"]) for s in found] == [
        (s.key, s.image, s.identity, s.source) for s in samples
    ]
    loader = torch.utils.data.DataLoader(dataset.to_tuple("__key__", "cls"), batch_size=3)
    batches = [(list(batch_keys), labels.tolist()) for batch_keys, labels in loader]
    assert [key for batch, _ in batches for key in batch] == [s.key for s in samples]
    assert [label for _, batch in batches for label in batch] == [s.identity for s in samples]


def test_equal_samples_give_equal_bytes():
    samples = some(5, source="x")
    first = write(samples)
    assert write(samples) == first
    assert write([Sample(s.key, memoryview(s.image), s.identity, s.source) for s in samples]) == first
    # pinned: another version that writes other bytes would make every finished data set unresumable
    assert sha256_hex(first) == "458127791fe7ec2eef91771927d1573c6efc47918b2ba0c44022f85316f4400d"
    assert sha256_hex(first) == hashlib.sha256(first).hexdigest()


def test_the_writer_counts_samples_and_labels():
    writer = ShardWriter()
    for sample in some(5):
        writer.add(sample)
    assert (writer.samples, writer.labels) == (5, {0, 1, 2})


def test_an_empty_shard_is_an_empty_tar():
    with tarfile.open(fileobj=io.BytesIO(write([]))) as tar:
        assert tar.getmembers() == []
    assert read(write([])) == []


@pytest.mark.parametrize("key", ["k" * 95, "ü" * 47, "漢字/" * 10 + "k"])
def test_keys_up_to_95_bytes(key: str):
    assert read(write([Sample(key, b"1", 0)])) == [Sample(key, b"1", 0)]


@pytest.mark.parametrize("key", ["k" * 96, "ü" * 48, "", "a.b", "a/b.c", ".hidden", "a/", "/a", "a//b", "nul\0", "."])
def test_keys_that_would_not_come_back_are_refused(key: str):
    with pytest.raises(ShardError):
        write([Sample(key, b"1", 0)])


def test_a_refused_sample_leaves_the_writer_as_it_was():
    writer = ShardWriter()
    writer.add(Sample("a", b"1", 0))
    before = writer.finish()
    for bad in (Sample("k" * 96, b"1", 5, "source"), Sample("b.c", b"1", 5), Sample("b", b"1", -1)):
        with pytest.raises(ShardError):
            writer.add(bad)
    assert (writer.finish(), writer.samples, writer.labels) == (before, 1, {0})


def test_an_image_that_could_not_be_read_back_is_not_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard, "MAX_MEMBER_BYTES", 1000)
    assert len(read(write([Sample("a", bytes(1000), 0)]))) == 1
    with pytest.raises(ShardError, match="1001 bytes"):
        write([Sample("a", bytes(1001), 0)])


# --- which members make a sample ---


def reasons(members: list[tuple[str, bytes]]) -> list[tuple[str, str | int]]:
    return [(item.key, item.identity if isinstance(item, Sample) else item.reason) for item in read(foreign_tar(members))]


@pytest.mark.parametrize(
    ("label", "identity"), [(b"0", 0), (b"12\n", 12), (b"  7 ", 7), (b"007", 7), (b"9223372036854775807", 2**63 - 1), (b"0" * 32, 0)]
)
def test_labels(label: bytes, identity: int):
    assert reasons([("a.jpg", b"i"), ("a.cls", label)]) == [("a", identity)]


@pytest.mark.parametrize(
    "label",
    [b"", b"-1", b"+1", b"1.0", b"one", b"1 2", b"1_0", b"9223372036854775808", b"9" * 5000, b"0" * 32 + b"1", "٣".encode(), b"\xff"],
)
def test_bad_labels_are_rejected(label: bytes):
    assert reasons([("a.jpg", b"i"), ("a.cls", label)]) == [("a", "bad-label")]


def test_a_sample_needs_an_image_and_a_label():
    members = [("a.jpg", b"1"), ("b.cls", b"1"), ("c.txt", b"1"), ("d.png", b"1"), ("d.cls", b"4"), ("e.JPG", b"1"), ("e.CLS", b"5")]
    assert reasons(members) == [("a", "no-label"), ("b", "no-image"), ("c", "no-image"), ("d", 4), ("e", 5)]
    row = read(foreign_tar([("a.jpg", b"123"), ("a.txt", b"45")]))[0]
    assert isinstance(row, Rejected)
    assert row.num_bytes == 5


def test_the_extension_begins_at_the_first_dot_of_the_last_part():
    assert reasons([("a.b/c.jpg", b"1"), ("a.b/c.cls", b"2"), ("x/k.jpg", b"1"), ("y/k.cls", b"2"), ("z.seg.jpg", b"1")]) == [
        ("a.b/c", 2),
        ("x/k", "no-label"),
        ("y/k", "no-image"),
        ("z", "no-image"),
    ]


def test_a_key_met_twice_in_a_row_is_two_samples():
    members = [("a.jpg", b"1"), ("a.cls", b"1"), ("a.jpg", b"2"), ("a.cls", b"2")]
    assert read(foreign_tar(members)) == [Sample("a", b"1", 1), Sample("a", b"2", 2)]


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 200_000, b"[1]", b'{"source": 5}', b'{"source": {"a": 1}}', b"\xff\xfe", b"9" * 5000, b""]
)
def test_other_peoples_json_costs_nothing(content: bytes):
    assert read(foreign_tar([("a.jpg", b"1"), ("a.cls", b"1"), ("a.json", content)])) == [Sample("a", b"1", 1, None)]


# --- the ledger ---


rows = st.lists(
    st.builds(
        Rejected, *[st.text(st.characters(codec="utf-8"))] * 3, st.integers(0, 2**62), st.none() | st.just("src"), st.integers(1, 10**9)
    ),
    max_size=5,
)


@given(rows)
@settings(max_examples=40, deadline=None)
def test_the_ledger_comes_back_and_is_the_same_bytes_each_time(rejected: list[Rejected]):
    data = write_ledger(rejected)
    assert read_ledger(data) == rejected
    assert write_ledger(rejected) == data


def test_a_damaged_ledger_is_a_shard_error():
    good = write_ledger([Rejected("k", "reason", "error", 5, "source", 2)] * 50)
    rng = random.Random(0)
    for data in (b"", b"PAR1", b"no parquet", good[:-1], good[: len(good) // 2], good[4:]):
        with pytest.raises(ShardError):
            read_ledger(data)
    for _ in range(100):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with contextlib.suppress(ShardError):
            read_ledger(bytes(data))


def test_a_parquet_of_other_columns_is_no_ledger():
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"], "reason": ["b"]}), file)
    with pytest.raises(ShardError, match="ledger"):
        read_ledger(file.getvalue())
