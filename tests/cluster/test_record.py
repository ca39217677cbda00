"""InsightFace records, written here the way MXNet's C++ and Python write them, read by ours."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.record import MAGIC, Record, RecordFile, read_records
from cluster.shard import ShardError, sha256_hex
from cluster.store import StoreError, join_url, open_store

MAGIC_BYTES = b"\x0a\x23\xd7\xce"


def dmlc_write(data: bytes) -> bytes:
    """RecordIOWriter::WriteRecord of dmlc-core: split where the magic lies at a multiple of four, which is left out."""
    out, start, parts = b"", 0, 0

    def part(kind: int, piece: bytes) -> bytes:
        return MAGIC_BYTES + struct.pack("<I", kind << 29 | len(piece)) + piece + bytes(-len(piece) % 4)

    for i in range(0, len(data) // 4 * 4, 4):
        if data[i : i + 4] == MAGIC_BYTES:
            out += part(1 if parts == 0 else 2, data[start:i])
            start, parts = i + 4, parts + 1
    return out + part(3 if parts else 0, data[start:])


def mxnet_pack(label: float | Sequence[float], number: int, image: bytes = b"") -> bytes:
    """mx.recordio.pack: a scalar label goes to the header, several follow it."""
    if isinstance(label, int | float):
        return struct.pack("<IfQQ", 0, label, number, 0) + image
    return struct.pack("<IfQQ", len(label), 0, number, 0) + np.asarray(label, "<f4").tobytes() + image


@dataclass
class Written:
    """A .rec and .idx in memory; ``starts`` are the byte offsets by record number."""

    rec: bytes
    idx: bytes
    starts: dict[int, int]

    def save(self, folder: Path, name: str = "train") -> str:
        (folder / f"{name}.rec").write_bytes(self.rec)
        (folder / f"{name}.idx").write_bytes(self.idx)
        return str(folder / f"{name}.rec")


def write(records: Sequence[tuple[int, bytes]]) -> Written:
    """MXIndexedRecordIO: records in the order given, index lines ``number<TAB>offset``."""
    rec, starts = b"", {}
    for number, packed in records:
        starts[number] = len(rec)
        rec += dmlc_write(packed)
    return Written(rec, "".join(f"{n}\t{at}\n" for n, at in starts.items()).encode(), starts)


def insightface(images: Sequence[tuple[float | Sequence[float], bytes]], header: bool = True) -> Written:
    """As InsightFace's face2rec2: a header with two labels, the images from 1, then one record an identity."""
    count = len(images)
    records = [(i, mxnet_pack(label, i, image)) for i, (label, image) in enumerate(images, 1)]
    if header:
        labels = sorted({label if isinstance(label, int | float) else label[0] for label, _ in images})
        people = [(count + 1 + i, mxnet_pack((float(i), float(i + 1)), count + 1 + i)) for i in range(len(labels))]
        records = [(0, mxnet_pack((count + 1, count + 1 + len(people)), 0)), *records, *people]
    return write(records)


def read_all(url: str, step: int = 10**6) -> list[tuple[int, int | None, bytes]]:
    file = RecordFile(url)
    offsets, _ = file.image_offsets()
    found: list[Record] = []
    for start in range(0, len(offsets) - 1, step):
        found += read_records(file.read(int(offsets[start]), int(offsets[min(start + step, len(offsets) - 1)])))
    return [(record.number, record.identity, bytes(record.image)) for record in found]


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((112, 112, 3), number % 256, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def numbered(count: int) -> list[tuple[float, bytes]]:
    return [(i // 3, jpeg(i)) for i in range(count)]


@pytest.mark.parametrize("step", [1, 3, 100])
def test_images_come_back_in_ranges_of_any_size(tmp_path: Path, step: int):
    url = insightface(numbered(10)).save(tmp_path)
    assert read_all(url, step) == [(i + 1, i // 3, jpeg(i)) for i in range(10)]


def test_records_are_read_from_s3(s3_root: str):
    written = insightface(numbered(4))
    store = open_store(s3_root)
    store.put("ms1m/train.rec", written.rec)
    store.put("ms1m/train.idx", written.idx)
    assert read_all(join_url(s3_root, "ms1m", "train.rec"), 2) == [(i + 1, i // 3, jpeg(i)) for i in range(4)]


def test_a_relative_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    insightface(numbered(2)).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(read_all("train.rec")) == 2


def test_a_file_without_header_is_all_images(tmp_path: Path):
    written = write([(i, mxnet_pack(float(i), i, b"image %d" % i)) for i in range(4)])
    assert read_all(written.save(tmp_path)) == [(i, i, b"image %d" % i) for i in range(4)]


def test_the_index_may_be_in_any_order_and_have_windows_line_ends(tmp_path: Path):
    written = insightface(numbered(5))
    lines = written.idx.splitlines()
    random.Random(0).shuffle(lines)
    written.idx = b"\r\n".join(lines) + b"\r\n"
    assert [number for number, _, _ in read_all(written.save(tmp_path))] == [1, 2, 3, 4, 5]


def test_the_digest_is_that_of_the_index(tmp_path: Path):
    written = insightface(numbered(3))
    offsets, digest = RecordFile(written.save(tmp_path)).image_offsets()
    assert digest == sha256_hex(written.idx)
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [written.starts[number] for number in (1, 2, 3, 4)]


payloads = st.lists(st.sampled_from([MAGIC_BYTES, b"abcd", b"x", b"\0" * 5, MAGIC_BYTES[:3], MAGIC_BYTES * 2]), max_size=8).map(b"".join)


@given(st.lists(st.tuples(st.integers(0, 1000), payloads.filter(bool)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_images_that_hold_the_magic_number_are_joined_again(images: list[tuple[int, bytes]]):
    data = b"".join(dmlc_write(mxnet_pack(label, i, image)) for i, (label, image) in enumerate(images))
    assert [(r.number, r.identity, bytes(r.image)) for r in read_records(data)] == [(i, *image) for i, image in enumerate(images)]


def test_a_split_record_really_is_split():
    image = b"12345678" + MAGIC_BYTES + b"abc"  # the header's 24 bytes are a multiple of four
    written = dmlc_write(mxnet_pack(1, 0, image))
    kinds = [struct.unpack_from("<I", written, i + 4)[0] >> 29 for i in range(0, len(written), 4) if written[i : i + 4] == MAGIC_BYTES]
    assert kinds == [1, 3]
    assert struct.unpack("<I", MAGIC_BYTES)[0] == MAGIC
    assert len(dmlc_write(mxnet_pack(1, 0, b"1" + image))) == 8 + 24 + 16  # not at a multiple of four: whole


@pytest.mark.parametrize(
    ("label", "identity"),
    [
        (0.0, 0),
        (7.0, 7),
        (16777216.0, 1 << 24),
        ([5.0, 0.25, 0.75], 5),
        ([3.0], 3),
        (0.5, None),
        (-1.0, None),
        (-0.0, 0),
        (float("nan"), None),
        (float("inf"), None),
        (float("-inf"), None),
        (3e38, None),
        (float(2**63), None),
        ([0.5, 1.0], None),
    ],
)
def test_labels(label: float | list[float], identity: int | None):
    (record,) = read_records(dmlc_write(mxnet_pack(label, 9, b"image")))
    assert (record.number, record.identity, bytes(record.image)) == (9, identity, b"image")


def test_a_flag_larger_than_its_record_costs_the_label_and_not_the_image():
    """The image must not vanish as if it were an index record."""
    data = struct.pack("<IfQQ", 1 << 20, 5.0, 3, 0) + b"image"
    (record,) = read_records(dmlc_write(data))
    assert (record.number, record.identity) == (3, None)


def test_identity_records_are_passed_over():
    data = insightface(numbered(4))
    assert [record.number for record in read_records(data.rec)] == [1, 2, 3, 4]


def test_counts_that_a_float32_rounds_lose_no_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One past 2**24 images cannot be told from 2**24 by a float32: the header says too few."""
    count = (1 << 24) + 4
    assert int(np.float32(count + 1)) == count  # without care the last image would be cut off
    size, header = 64, dmlc_write(mxnet_pack((count + 1, count + 9), 0))
    numbers = np.arange(count + 1 + 8)

    class Stub(RecordFile):
        def _parse(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
            return numbers, numbers * size

        def read(self, start: int, stop: int) -> bytes:
            return header

    (tmp_path / "a.idx").write_bytes(b"0\t0\n")
    with (tmp_path / "a.rec").open("wb") as file:
        file.truncate(len(numbers) * size)  # sparse
    offsets, _ = Stub(str(tmp_path / "a.rec")).image_offsets()
    first, last = int(offsets[0]) // size, int(offsets[-1]) // size - 1
    assert first == 1
    assert count <= last <= count + 8  # index records among them hold no image and are passed over


# --- damage ---


def error_of(url: str) -> StoreError:
    with pytest.raises(StoreError) as caught:
        RecordFile(url).image_offsets()
    assert Path(url).stem in str(caught.value)
    return caught.value


def test_a_missing_index_is_named(tmp_path: Path):
    url = insightface(numbered(3)).save(tmp_path)
    (tmp_path / "train.idx").unlink()
    error = error_of(url)
    assert error.fatal
    assert "train.idx does not exist" in str(error)


def test_missing_records_are_named(tmp_path: Path):
    url = insightface(numbered(3)).save(tmp_path)
    (tmp_path / "train.rec").unlink()
    assert "train.rec" in str(error_of(url))


@pytest.mark.parametrize(
    "idx",
    [
        b"",
        b"\n",
        b"hello\n",
        b"1 2\n",
        b"0\t0\n1\n",
        b"0\t0\n1\t\n",
        b"0\tx\n",
        b"0\t0\t0\n",
        b"0\t0\n1\t-8\n",
        b"\xff\xfe\0\0",
        b"0\t1e3\n",
    ],
)
def test_an_index_that_is_none_is_named(tmp_path: Path, idx: bytes):
    written = insightface(numbered(3))
    written.idx = idx
    assert error_of(written.save(tmp_path)).fatal


def test_records_cut_short_are_refused_or_end_in_an_error(tmp_path: Path):
    written = insightface(numbered(6))
    for number, place in written.starts.items():
        url = Written(written.rec[: place + 5], written.idx, {}).save(tmp_path, f"cut{number}")
        if number == max(written.starts):
            continue  # a cut in the last identity record costs no image
        assert "cut short" in str(error_of(url))
    url = Written(written.rec[: written.starts[8] + 3], written.idx, {}).save(tmp_path, "last")
    assert len(read_all(url)) == 6


def test_a_last_image_cut_short_is_a_shard_error(tmp_path: Path):
    written = insightface(numbered(6), header=False)
    url = Written(written.rec[:-20], written.idx, {}).save(tmp_path)
    with pytest.raises(ShardError):
        read_all(url)


def test_an_index_cut_short_does_not_lose_images_in_silence(tmp_path: Path):
    written = insightface(numbered(9))
    lines = written.idx.splitlines(keepends=True)
    for kept in (1, 2, 5, 9):
        written.idx = b"".join(lines[:kept])
        assert error_of(written.save(tmp_path, f"kept{kept}")).fatal


def test_an_index_with_a_line_missing_is_refused(tmp_path: Path):
    written = insightface(numbered(9))
    lines = written.idx.splitlines(keepends=True)
    written.idx = b"".join(lines[:4] + lines[5:])
    assert "images 1 to 9" in str(error_of(written.save(tmp_path)))


def test_the_index_of_another_file_is_refused_or_ends_in_an_error(tmp_path: Path):
    one, other = insightface(numbered(9)), insightface([(i, bytes([i + 1]) * (50 + 7 * i)) for i in range(9)])
    larger = Written(other.rec, one.idx, {}).save(tmp_path, "larger")
    assert "of another file" in str(error_of(larger))
    with pytest.raises(ShardError, match="damaged"):
        read_all(Written(one.rec, other.idx, {}).save(tmp_path, "smaller"), 1)


@pytest.mark.parametrize("labels", [(float("nan"), 1.0), (float("inf"), 1.0), (-5.0, 1.0), (0.0, 0.0), (3e38, 1.0)])
def test_a_header_of_nonsense_is_named(tmp_path: Path, labels: tuple[float, float]):
    written = write([(0, mxnet_pack(labels, 0)), *[(i, mxnet_pack(1.0, i, b"image")) for i in range(1, 4)]])
    assert error_of(written.save(tmp_path)).fatal


@pytest.mark.parametrize(
    "first", [b"no record at all", MAGIC_BYTES + b"\x04\0\0\0abcd", b"", struct.pack("<IIIfQQ", MAGIC, 24, 9, 0, 0, 0)]
)
def test_a_damaged_first_record_is_named(tmp_path: Path, first: bytes):
    written = insightface(numbered(3))
    rec = first + written.rec[len(first) :]
    if first:
        assert error_of(Written(rec, written.idx, {}).save(tmp_path)).fatal
    else:
        assert len(read_all(Written(rec, written.idx, {}).save(tmp_path))) == 3


def test_what_came_before_the_damage_is_kept():
    written = insightface(numbered(6), header=False)
    starts = written.starts
    for number in starts:
        data = bytearray(written.rec)
        data[starts[number]] ^= 1  # the magic number
        records = read_records(bytes(data))
        assert [next(records).number for _ in range(1, number)] == list(range(1, number))
        with pytest.raises(ShardError, match=f"byte {starts[number]}"):
            next(records)


@given(st.binary(max_size=300), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_nothing_but_shard_error(noise: bytes, seed: int):
    rng = random.Random(seed)
    data = bytearray(
        dmlc_write(mxnet_pack(1, 1, b"12345678" + MAGIC_BYTES + b"abcde")) + dmlc_write(mxnet_pack([2.0, 3.0], 2, b"image")) + noise
    )
    for _ in range(rng.randint(0, 4)):
        data[rng.randrange(len(data))] = rng.choice([0, 0xFF, 0x20, 0x80, 0xA0, rng.randrange(256)])
    try:
        for record in read_records(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])):
            assert record.identity is None or 0 <= record.identity < 1 << 63
    except ShardError:
        pass


@pytest.mark.parametrize("kind", [4, 5, 6, 7])
def test_part_numbers_that_do_not_exist_are_damage(kind: int):
    begin = MAGIC_BYTES + struct.pack("<I", 1 << 29 | 24) + bytes(24)
    middle = MAGIC_BYTES + struct.pack("<I", kind << 29 | 4) + bytes(4)
    end = MAGIC_BYTES + struct.pack("<I", 3 << 29 | 4) + bytes(4)
    for data in (begin + middle + end, middle, end, begin + begin + end, begin):
        with pytest.raises(ShardError):
            list(read_records(data))
    assert len(list(read_records(begin + end))) == 1
