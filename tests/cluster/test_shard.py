"""Our tar reader and writer against tarfile and webdataset, and against everything that can be wrong with a tar."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import tarfile
import time
from pathlib import Path

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import shard, tar
from cluster.shard import (
    BLOCK,
    Rejected,
    Sample,
    ShardError,
    ShardWriter,
    read_ledger,
    read_members,
    read_samples,
    sha256_hex,
    write_ledger,
)

names = st.text(st.characters(exclude_characters="/.\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
keys = st.builds("/".join, st.lists(names, min_size=1, max_size=3)).filter(lambda key: len(key.encode()) <= 95)
foreign_names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=60)
samples_lists = st.lists(
    st.builds(
        Sample, keys, st.binary(min_size=1, max_size=1200), st.integers(0, 2**63 - 1), st.none() | st.text(st.characters(codec="utf-8"))
    ),
    unique_by=lambda sample: sample.key,
    max_size=6,
)


def write(samples: list[Sample]) -> bytes:
    writer = ShardWriter()
    for sample in samples:
        writer.add(sample)
    return writer.finish()


def plain(item: Sample | Rejected) -> Sample | Rejected:
    """With the image as bytes, so that samples compare."""
    return Sample(item.key, bytes(item.image), item.identity, item.source) if isinstance(item, Sample) else item


def read(data: bytes) -> list[Sample | Rejected]:
    return [plain(item) for item in read_samples(data)]


def read_damaged(data: bytes) -> tuple[list[Sample | Rejected], str]:
    """What came before the damage, and the error ("" where there is none)."""
    found: list[Sample | Rejected] = []
    try:
        for item in read_samples(data):
            found.append(plain(item))
    except ShardError as error:
        return found, str(error)
    return found, ""


def some(count: int, first: int = 0, source: str | None = None) -> list[Sample]:
    return [Sample(f"k{i:04d}", bytes([i % 256]) * (100 + 77 * i), i // 2, source) for i in range(first, first + count)]


def foreign_tar(members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar by Python's tarfile."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1234567, "someone"
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def raw_member(name: bytes, data: bytes, kind: bytes = b"0", size: bytes | None = None, **fields: bytes) -> bytes:
    """A member with any header at all, its checksum right."""
    header = bytearray(BLOCK)
    header[: len(name)] = name
    header[124:136] = (size or b"%011o\0" % len(data)).ljust(12, b"\0")
    header[156:157], header[257:265] = kind, b"ustar\x0000"
    prefix = fields.get("prefix", b"")
    header[345 : 345 + len(prefix)] = prefix
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)


# --- written by us, read by others ---


@given(samples_lists)
@settings(max_examples=80, deadline=None)
def test_what_is_written_is_read_back_by_us_and_by_tarfile(samples: list[Sample]):
    data = write(samples)
    assert read(data) == samples
    expected = {}
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


# --- written by others, read by us ---


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(st.lists(st.tuples(st.builds("/".join, st.lists(foreign_names, min_size=1)), st.binary(max_size=2000)), max_size=6))
@settings(max_examples=30, deadline=None)
def test_members_of_any_tar_format(tar_format: int, members: list[tuple[str, bytes]]):
    try:
        data = foreign_tar(members, tar_format)
    except ValueError:  # USTAR: the name is too long
        return
    assert [(member.name, bytes(member.data)) for member in read_members(data)] == members


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names(tar_format: int):
    members = [("d" * 150 + "/" + "n" * 200 + ".jpg", b"1"), ("short.cls", b"2"), ("漢" * 60 + "/ü.jpg", b"3"), ("ü.cls", b"4")]
    data = foreign_tar(members, tar_format)
    assert [(member.name, bytes(member.data)) for member in read_members(data)] == members


def test_the_prefix_field_is_part_of_the_name():
    name = "p" * 90 + "/" + "n" * 80 + ".jpg"  # over 100 bytes, so that tarfile splits it
    assert [member.name for member in read_members(foreign_tar([(name, b"1")]))] == [name]


def test_folders_and_global_headers_are_passed_over():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}) as tar:
        folder = tarfile.TarInfo("images")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [("images/a.jpg", b"image"), ("images/a.cls", b"7")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert read(file.getvalue()) == [Sample("images/a", b"image", 7)]


def test_the_last_path_of_a_pax_header_counts():
    record = b"17 path=first.aa\n18 path=other.jpg\n"
    data = raw_member(b"pax", record, b"x") + raw_member(b"short", b"1") + END
    assert [member.name for member in read_members(data)] == ["other.jpg"]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"7", b"S", b"D", b"M", b"V", b"Z", b"\xff"])
def test_what_is_no_regular_file_costs_its_own_row(kind: bytes):
    data = write(some(2))[: -2 * BLOCK] + raw_member(b"evil.jpg", b"", kind) + raw_member(b"evil.cls", b"1") + write(some(2, first=2))
    found, error = read_damaged(data)
    assert not error
    assert [item for item in found if isinstance(item, Sample)] == some(4)
    (row,) = [item for item in found if isinstance(item, Rejected)]
    assert (row.key, row.reason, found.index(row)) == ("evil", "not-a-file", 2)


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


# --- damage ---


def test_a_tar_cut_anywhere_gives_the_samples_before_the_cut():
    samples = some(4, source="origin")
    data = write(samples)
    ends, offset = [], 0  # where each sample's label, and with it the sample, is whole
    for sample in samples:
        for size in (len(sample.image), len(b"%d" % sample.identity), len(json.dumps({"source": sample.source}))):
            offset += BLOCK + size + -size % BLOCK
        ends.append(offset)
    assert offset == len(data) - 2 * BLOCK
    rng = random.Random(0)
    places = {0, 1, BLOCK - 1, BLOCK, BLOCK + 1, *ends, *(e + 1 for e in ends), *(e - 1 for e in ends), *rng.sample(range(offset), 200)}
    for cut in sorted(places):
        found, error = read_damaged(data[:cut])
        assert error, cut
        whole = [Sample(s.key, s.image, s.identity, s.source) for s, end in zip(samples, ends, strict=True) if end <= cut]
        assert found[: len(whole)] == whole, cut
        # the sample at the cut is there only with its whole image and label; its .json may be lost
        for extra in found[len(whole) :]:
            expected = samples[len(whole)]
            assert isinstance(extra, Sample), cut
            assert (extra.key, extra.image, extra.identity) == (expected.key, expected.image, expected.identity), cut
        assert len(found) <= len(whole) + 1
    assert read_damaged(data[: offset + BLOCK]) == (samples, "")  # one end block is enough, as for tarfile


def test_every_flipped_bit_of_a_header_is_noticed():
    samples = some(3)
    data = bytearray(write(samples))
    second = 2 * BLOCK * 2  # the header of the second sample's image: each of the first one's members fills one block
    assert bytes(data[second : second + 5]) == b"k0001"
    for offset in range(second, second + BLOCK):
        for bit in (0, 6):
            data[offset] ^= 1 << bit
            found, error = read_damaged(bytes(data))
            data[offset] ^= 1 << bit
            if 148 <= offset - second < 156 and not error:  # the checksum's own padding may change without harm
                assert found == samples
            else:
                assert error
                assert found == samples[:1]


@pytest.mark.parametrize(
    "size",
    [b"-0000001000", b"-1", b"+1", b"0o17", b"1_0", b"00000000009", b"77777777777", b"\x80" + b"\0" * 5 + b"\1" * 6, b"\xff" * 12, b"1 1"],
)
def test_lying_sizes_end_the_tar(size: bytes):
    start = time.monotonic()
    found, error = read_damaged(write(some(1))[: -2 * BLOCK] + raw_member(b"b.jpg", b"1", size=size) + END)
    assert found == some(1)
    assert error
    assert time.monotonic() - start < 1


def test_a_member_above_the_limit_costs_its_own_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 1000)
    found = read(foreign_tar([("a.jpg", bytes(1001)), ("a.cls", b"1"), ("b.jpg", bytes(1000)), ("b.cls", b"2")]))
    assert [item.reason if isinstance(item, Rejected) else item.identity for item in found] == ["too-large", 2]


def test_a_claim_above_the_limit_is_refused_before_it_is_touched():
    with pytest.raises(ShardError, match="cut short"):
        list(read_members(raw_member(b"a.jpg", b"", size=b"%011o" % (65 << 20)) + END))
    with pytest.raises(ShardError, match="claims 70000"):
        list(read_members(raw_member(b"a", b"n" * 70_000, b"L") + END))


@pytest.mark.parametrize(
    "record",
    [b"x", b"0 a=b\n", b"3 a\n", b"99 path=a\n", b"1 " * 30_000, b"9" * 5000 + b" path=a\n", b"-5 path=a\n", b"12\xffpath=a\n", b"\0" * 50],
)
def test_damaged_pax_headers(record: bytes):
    start = time.monotonic()
    with pytest.raises(ShardError):
        list(read_members(raw_member(b"pax", record, b"x") + raw_member(b"a.jpg", b"1") + END))
    assert time.monotonic() - start < 1


def test_a_wiped_header_does_not_end_the_tar_in_silence():
    data = bytearray(write(some(4)))
    third = next(i for i in range(0, len(data), BLOCK) if data[i : i + 9] == b"k0002.jpg")
    data[third : third + BLOCK] = bytes(BLOCK)
    found, error = read_damaged(bytes(data))
    assert found == some(2)
    assert "end-of-archive" in error
    assert read_damaged(write(some(2)) + write(some(2, first=2)))[1]  # joined tars: no sample is dropped without a word
    assert read(write(some(2)) + bytes(20 * BLOCK)) == some(2)  # the padding that tar programs write


@pytest.mark.parametrize("data", [b"", b"x", bytes(511), b"not a tar " * 200, b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar_is_a_shard_error(data: bytes):
    with pytest.raises(ShardError):
        list(read_samples(data))


@given(st.binary(max_size=1500))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_nothing_but_shard_error(data: bytes):
    read_damaged(data)


def test_thousands_of_mutated_tars_raise_nothing_but_shard_error():
    rng = random.Random(1)
    members = [
        ("a" * 150 + ".jpg", b"1" * 700),
        ("a" * 150 + ".cls", b"5"),
        ("b.jpg", b"2"),
        ("b.cls", b"x"),
        ("b.json", b'{"source": "s"}'),
    ]
    originals = [write(some(3, source="s")), *(foreign_tar(members, kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))]
    start = time.monotonic()
    for _ in range(3000):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            block = rng.randrange(0, len(data) // BLOCK) * BLOCK
            field = rng.choice([(0, 100), (124, 136), (156, 157), (345, 500), (0, 512)])
            at = block + rng.randrange(*field)
            data[at] = rng.choice([0, 0x30, 0x37, 0x2D, 0x20, 0x4C, 0x78, 0x80, 0xFF, rng.randrange(256)])
            if rng.random() < 0.8:  # a right checksum lets the damage through to the code behind it
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + BLOCK])
        read_damaged(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
    assert time.monotonic() - start < 20


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
