"""One WebDataset tar in memory: reading, writing, and the rows that were left out.

Own code where this project's throughput lives: walking 512-byte headers of a memoryview (cluster/tar.py) reads a shard about five times
as fast as ``tarfile`` or ``webdataset`` (benchmarks/shard.py). What is written is plain USTAR.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.tar import BLOCK, MAX_MEMBER_BYTES, Member, ShardError, read_members

MAX_KEY_BYTES = 95
"""With its longest extension a key fills the name field of a USTAR header."""
MAX_JSON_BYTES = 64 << 10
"""A longer .json is none of ours: parsed, it could take twenty times its size."""
MAX_PARTS = 32
"""Members of one key that are looked at."""
_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
_KEY = re.compile(r"(?:[^/\0]+/)*[^/.\0]+")


@dataclass(frozen=True, slots=True)
class Sample:
    """One face: ``key`` unique in the data set, ``image`` an encoded picture, ``identity`` the label >= 0, ``source`` where an
    original came from (never set in a protected set)."""

    key: str
    image: bytes | memoryview
    identity: int
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """One row of the quarantine ledger: what was left out, why, and what would help. Never the picture itself.

    ``num_samples`` is above 1 where a whole shard was given up and its samples could not be told apart.
    """

    key: str
    reason: str
    error: str
    num_bytes: int
    source: str | None = None
    num_samples: int = 1


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def read_samples(data: bytes | memoryview, *, sources: bool = True) -> Iterator[Sample | Rejected]:
    """Group a tar's members into samples by key, as WebDataset does (the name up to the first dot of its last part). Without ``sources``
    the origins of originals are left unread.

    A sample that cannot be used comes as a Rejected row, and a key met twice as two samples. Raises ShardError where the tar itself is
    damaged, after the samples that are whole.
    """
    key: str | None = None
    parts: dict[str, Member] = {}
    try:
        for member in read_members(data):
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            member_key, extension = folder + slash + stem, extension.lower()
            if key is not None and (member_key != key or extension in parts):
                yield _sample(key, parts, sources)
                parts = {}
            key = member_key
            if len(parts) < MAX_PARTS or extension == "cls" or extension in _IMAGES:
                parts[extension] = member
    except ShardError:
        last = _sample(key, parts, sources) if key is not None else None
        if isinstance(last, Sample):
            yield last
        raise
    if key is not None:
        yield _sample(key, parts, sources)


def _sample(key: str, parts: dict[str, Member], sources: bool) -> Sample | Rejected:
    """The sample of one key's members."""
    if not key.isascii():  # bytes that are no Unicode cannot be written as JSON or parquet
        key = key.encode(errors="surrogateescape").decode(errors="replace")
    image = next((parts[name] for name in _IMAGES if name in parts), None)
    label, origin = parts.get("cls"), parts.get("json")
    if image is None or label is None or image.problem or label.problem:
        return Rejected(key, *_lack(parts, image), sum(len(member.data) for member in parts.values()))
    text = bytes(label.data[:32]).strip()
    if len(label.data) > 32 or not text.isdigit() or int(text) >= 1 << 63:
        size = sum(len(member.data) for member in parts.values())
        return Rejected(key, "bad-label", f"the .cls member is no integer from 0 to 2**63 - 1: {text[:20]!r}", size)
    return Sample(key, image.data, int(text), _source(origin.data) if origin and sources else None)


def _lack(parts: dict[str, Member], image: Member | None) -> tuple[str, str]:
    """Why these members make no sample: a reason and a sentence."""
    problem = next((member.problem for member in parts.values() if member.problem), None)
    if problem:
        return problem
    if image is None:
        return "no-image", f"members {sorted(parts)!r:.200} hold no .jpg, .jpeg, .png, .webp or .bmp"
    return "no-label", "no .cls member gives the identity"


def _source(data: memoryview) -> str | None:
    """The origin in a ``.json`` member of ours; other people's JSON has none."""
    if len(data) > MAX_JSON_BYTES:
        return None
    try:
        content = json.loads(bytes(data))
    except (ValueError, RecursionError):
        return None
    source = content.get("source") if isinstance(content, dict) else None
    return source if isinstance(source, str) else None


class ShardWriter:
    """Builds a shard's bytes. The same samples in the same order give the same bytes: mtime, owner and mode are fixed."""

    def __init__(self) -> None:
        self._parts: list[bytes | memoryview] = []
        self.samples = 0
        self.labels: set[int] = set()

    def add(self, sample: Sample) -> None:
        """Append ``<key>.jpg``, ``<key>.cls`` and, for an original, ``<key>.json``.

        Raises:
            ShardError: a reader would not give the sample back; nothing of it was appended.
        """
        if not _KEY.fullmatch(sample.key) or len(sample.key.encode()) > MAX_KEY_BYTES:
            raise ShardError(f"the key {sample.key!r} is longer than {MAX_KEY_BYTES} bytes, or its last part is empty or has a dot")
        if sample.identity < 0 or len(sample.image) > MAX_MEMBER_BYTES:
            raise ShardError(
                f"cannot write {sample.key} with identity {sample.identity} and {len(sample.image)} bytes: an identity is >= 0, "
                f"an image has at most {MAX_MEMBER_BYTES} bytes"
            )
        self._member(f"{sample.key}.jpg", sample.image)
        self._member(f"{sample.key}.cls", b"%d" % sample.identity)
        if sample.source is not None:
            self._member(f"{sample.key}.json", json.dumps({"source": sample.source}).encode())
        self.samples += 1
        self.labels.add(sample.identity)

    def _member(self, name: str, data: bytes | memoryview) -> None:
        self._parts += (_header(name, len(data)), data, bytes(-len(data) % BLOCK))

    def finish(self) -> bytes:
        """The tar's bytes with its end-of-archive blocks."""
        return b"".join([*self._parts, bytes(2 * BLOCK)])


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("reason", pa.string()),
        ("error", pa.string()),
        ("num_bytes", pa.int64()),
        ("source", pa.string()),
        ("num_samples", pa.int64()),
    ]
)


def write_ledger(rows: Iterable[Rejected]) -> bytes:
    """The quarantine rows of one shard as parquet."""
    table = pa.Table.from_pylist([{name: getattr(row, name) for name in _SCHEMA.names} for row in rows], schema=_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def read_ledger(data: bytes) -> list[Rejected]:
    """The inverse of write_ledger. Raises ShardError when the bytes are no ledger."""
    try:
        table = pq.read_table(io.BytesIO(data)).select(_SCHEMA.names).cast(_SCHEMA)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ShardError(f"no quarantine ledger: {error}") from None
    return [Rejected(**row) for row in table.to_pylist()]


_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"\0" + b"0" * 11 + b"\0"
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
_FIXED_SUM = sum(_OWNER + _TIME + _TAIL) + 8 * 32  # the checksum's own field counts as eight spaces


def _header(name: str, size: int) -> bytes:
    """A USTAR header of a regular file: mode 0644, owner 0, mtime 0."""
    field, digits = name.encode(), b"%011o" % size
    checksum = sum(field) + sum(digits) + _FIXED_SUM
    return b"".join((field.ljust(100, b"\0"), _OWNER, digits, _TIME, b"%06o\0 " % checksum, _TAIL))
