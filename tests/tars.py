"""Tars for tests: by our writer, by tarfile, and by hand with any header at all; and readers that say what came before the damage."""

from __future__ import annotations

import io
import tarfile

from cluster.shard import Rejected, Sample, ShardWriter, read_samples
from cluster.tar import BLOCK, ShardError


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
