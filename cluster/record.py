"""InsightFace's .rec/.idx files (MXNet RecordIO with an image header), read by byte range and without mxnet.

Format: each record is ``<u4 magic 0xced7230a> <u4 flag << 29 | length> data``, padded to 4 bytes; an image whose bytes contain the magic
number at a 4-byte boundary is split there, and flag says first, middle or last part. Data is ``IfQQ`` (flag, label, id, id2), then ``flag``
float32 labels when flag > 0, then the JPEG. In InsightFace's files record 0 carries two labels: one past the last image's number, and one
past the last identity's (arcface_torch's own reader is the reference for both).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import csv

from cluster.shard import sha256_hex
from cluster.store import NotFound, StoreError, open_store, read_url, split_url
from cluster.tar import MAX_MEMBER_BYTES, ShardError

MAGIC = 0xCED7230A
_HEADER = struct.Struct("<IfQQ")


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a .rec: its number in the file, its label (None: no integer >= 0) and its encoded bytes."""

    number: int
    identity: int | None
    image: bytes | memoryview


class RecordFile:
    """``FILE.rec`` and the ``FILE.idx`` beside it, local or s3://."""

    def __init__(self, url: str) -> None:
        self._root, self._name = split_url(url)
        self._url, self._index_url = url, url.removesuffix(".rec") + ".idx"

    def image_offsets(self) -> tuple[np.ndarray, str]:
        """Byte offsets (N + 1,) int64 of the N image records in file order, the last one where they end, and the index's sha256.

        Raises:
            StoreError: a file is missing, the index is damaged, or it points past the end of the records.
        """
        try:
            data = read_url(self._index_url)
        except NotFound:
            raise StoreError(f"{self._url} needs its index beside it: {self._index_url} does not exist", fatal=True) from None
        numbers, offsets = self._parse(data)
        size = open_store(self._root).size(self._name)
        if len(offsets) == 0 or int(offsets.min()) < 0 or int(offsets.max()) >= size:
            raise StoreError(f"{self._index_url} does not fit {self._url} ({size} bytes): cut short, or of another file", fatal=True)
        order = np.argsort(offsets, kind="stable")  # linear where it is in order already, as it always was
        numbers, offsets = numbers[order], np.append(offsets[order], size)
        end = self._end_of_images(int(offsets[0]), int(offsets[1])) if numbers[0] == 0 else None
        if end is None:
            return offsets, sha256_hex(data)
        slack = end >> 23  # the rounding of a float32 must not cost an image
        images = np.flatnonzero((numbers >= 1) & (numbers < end + slack))
        if len(images) < max(1, end - 1 - slack) or np.any(np.diff(images) != 1):
            raise StoreError(f"{self._index_url} does not list images 1 to {end - 1} in one run: cut short, or of another file", fatal=True)
        return offsets[images[0] : images[-1] + 2], sha256_hex(data)

    def read(self, start: int, stop: int) -> bytes:
        """A byte range of the records."""
        return open_store(self._root).get_range(self._name, start, stop)

    def _parse(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Record numbers and byte offsets, int64, from lines ``number<TAB>offset``."""
        try:
            names = csv.ReadOptions(column_names=["number", "offset"])
            types = csv.ConvertOptions(column_types={"number": pa.int64(), "offset": pa.int64()})
            table = csv.read_csv(pa.BufferReader(data), names, csv.ParseOptions(delimiter="\t"), types)
        except pa.ArrowInvalid as error:
            raise StoreError(f"{self._index_url} is no index of lines number<TAB>offset: {error}", fatal=True) from None
        if table["number"].null_count or table["offset"].null_count:
            raise StoreError(f"{self._index_url} is no index of lines number<TAB>offset: a number is missing", fatal=True)
        return table["number"].to_numpy(), table["offset"].to_numpy()

    def _end_of_images(self, start: int, stop: int) -> int | None:
        """One past the last image's number when record 0 is InsightFace's header, None when it is an image."""
        try:
            data, _ = _join(memoryview(self.read(start, min(stop, start + MAX_MEMBER_BYTES))), 0)
            flag = _HEADER.unpack_from(data)[0]
            return int(np.frombuffer(data, "<f4", flag, _HEADER.size)[0]) if flag else None
        except (ValueError, OverflowError, struct.error) as error:  # ShardError is a ValueError
            raise StoreError(f"record 0 of {self._url} is damaged, or {self._index_url} is of another file: {error}", fatal=True) from None


def read_records(data: bytes | memoryview) -> Iterator[Record]:
    """The image records in a byte range that begins and ends between records; InsightFace's index records, which hold no image, are
    passed over (their place is known only roughly in large files, where record 0 gives it as float32).

    Raises:
        ShardError: the range is damaged; the records before it were already yielded.
    """
    view, offset = memoryview(data), 0
    while offset < len(view):
        record, following = _join(view, offset)
        if len(record) < _HEADER.size:
            raise ShardError(f"the record at byte {offset} of its range has {len(record)} bytes, no header fits")
        flag, label, number, _ = _HEADER.unpack_from(record)
        start = _HEADER.size + 4 * flag
        if start > len(record):
            yield Record(number, None, record[_HEADER.size :])  # the flag itself is damaged
        elif flag == 0 or start < len(record):
            yield Record(number, _identity(struct.unpack_from("<f", record, _HEADER.size)[0] if flag else label), record[start:])
        offset = following


def _identity(label: float) -> int | None:
    return int(label) if 0 <= label < 2**63 and label == int(label) else None


def _join(view: memoryview, offset: int) -> tuple[bytes | memoryview, int]:
    """The record at ``offset``, its parts joined, and where the next one begins."""
    parts: list[bytes | memoryview] = []
    while True:
        if offset + 8 > len(view):
            raise ShardError(f"cut short at byte {offset} of its range")
        magic, word = struct.unpack_from("<II", view, offset)
        kind, length = word >> 29, word & ((1 << 29) - 1)
        if magic != MAGIC or kind > 3 or offset + 8 + length > len(view) or (kind in (0, 1)) == bool(parts):
            raise ShardError(f"damaged at byte {offset} of its range")
        parts.append(view[offset + 8 : offset + 8 + length])
        offset += 8 + length + (-length) % 4
        if kind == 0:
            return parts[0], offset
        if kind == 3:
            return struct.pack("<I", MAGIC).join(parts), offset
