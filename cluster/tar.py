"""The members of a tar held in memory, strangers' tars included: nothing is copied, and no claim of a header is believed unchecked.

Plain USTAR, GNU long names, base-256 sizes and PAX records are understood. What is no regular file is named as such and passed over, as
Python's ``tarfile`` passes over it, so that both see the same members behind it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
MAX_MEMBER_BYTES = 64 << 20
"""A larger member is no face picture; it is refused before any of it is touched."""
MAX_NAME_BYTES = 64 << 10
"""A longer GNU name or PAX header names no picture."""

_ZEROS = bytes(BLOCK)
_RECORD = re.compile(rb"([0-9]{1,9}) ")
_SPARSE = b"GNU.sparse"
_EXTENSIONS = frozenset((b"L", b"K", b"x", b"X", b"g"))
_NO_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
"""Kinds that no data follows, whatever their size field says."""
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    b"7": "a contiguous file",
    b"S": "a sparse file",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


class ShardError(ValueError):
    """A tar that cannot be read further. The samples before the damage were already yielded."""


class NotATarError(ShardError):
    """Bytes that do not even begin as a tar does."""


class Member(NamedTuple):
    """One file of a tar.

    Attributes:
        name: as the tar has it, bytes that are no UTF-8 as surrogate escapes. Never a path to open.
        data: a view into the tar's bytes, empty when there is a problem.
        problem: a short reason and a sentence, when the member is nothing that could be read as a file; else None.
    """

    name: str
    data: memoryview
    problem: tuple[str, str] | None = None


def read_members(data: bytes | memoryview) -> Iterator[Member]:
    """Walk a tar held in memory without copying any of it. Folders are passed over; links, devices, sparse files and members above
    ``MAX_MEMBER_BYTES`` come with their problem.

    Raises:
        NotATarError: the first block is no tar header.
        ShardError: a header is damaged, a member runs past the end, or something follows the end of the archive (a hole of zeros where
            a header was).
    """
    view = memoryview(data)
    _require_begin(view)
    offset, attributes = 0, dict[bytes, bytes]()
    while offset + BLOCK <= len(view):
        header = bytes(view[offset : offset + BLOCK])
        if header == _ZEROS:
            _require_zeros(view, offset)
            return
        if not _checksum_fits(header, offset):
            raise ShardError(f"the tar header at byte {offset} is damaged (checksum)")
        kind, start = _kind(header, attributes), offset + BLOCK
        if kind == b"S":
            start = _end_of_sparse_map(view, header, start)
        size = _size(header, kind, attributes, offset)
        stop = start + size
        if stop > len(view):
            raise ShardError(f"the tar is cut short: the member at byte {offset} ends at {stop}, the tar at {len(view)}")
        if kind in _EXTENSIONS:
            attributes |= _extension(kind, bytes(view[start:stop]))
        else:
            if kind != b"5":
                yield _member(header, kind, view[start:stop], attributes)
            if attributes:
                attributes = {}
        offset = stop + (-size) % BLOCK
    raise ShardError(f"the tar is cut short: no end-of-archive block after byte {offset}")


def _member(header: bytes, kind: bytes, data: memoryview, attributes: dict[bytes, bytes]) -> Member:
    """The member behind a header, with the attributes that were given before it."""
    name = attributes.get(_SPARSE) or attributes.get(b"path") if attributes else None
    text = (_header_name(header) if name is None else name).decode("utf-8", "surrogateescape")
    is_file = kind in (b"0", b"\0") and _SPARSE not in attributes
    if is_file and len(data) <= MAX_MEMBER_BYTES:
        return Member(text, data)
    if is_file:
        problem = ("too-large", f"a member of {len(data)} bytes, the limit is {MAX_MEMBER_BYTES}: no face picture needs as many")
    else:
        found = _KINDS[b"S"] if _SPARSE in attributes else _KINDS.get(kind, f"of tar type {kind!r}")
        problem = ("not-a-file", f"a member is {found}, not a regular file: make the tar again with files only (tar --dereference)")
    return Member(text, data[:0], problem)


def _kind(header: bytes, attributes: dict[bytes, bytes]) -> bytes:
    """The type of a member. Before POSIX a folder was a file whose name, the whole of it, ends in a slash."""
    kind = header[156:157]
    if kind == b"\0" and attributes.get(b"path", header[:100].partition(b"\0")[0]).endswith(b"/"):
        return b"5"
    return kind


def _size(header: bytes, kind: bytes, attributes: dict[bytes, bytes], offset: int) -> int:
    """The bytes that follow a header. A PAX record counts more than the header's own field, as POSIX says and tar programs do."""
    if kind in _NO_DATA:
        return 0
    if kind in _EXTENSIONS:
        size = _number(header[124:136], offset)
        if size > MAX_NAME_BYTES:
            raise ShardError(f"the name or PAX header at byte {offset} claims {size} bytes, the limit is {MAX_NAME_BYTES}")
        return size
    if b"size" in attributes:
        digits = attributes[b"size"]
        if not digits.isdigit() or len(digits) > 20:
            raise ShardError(f"the PAX header before byte {offset} is damaged: {digits[:30]!r} is no size")
        return int(digits)
    return _number(header[124:136], offset)


def _number(field: bytes, offset: int) -> int:
    """A numeric field: octal digits, or base 256 behind a byte of 0x80 (0xff would be a negative number)."""
    return int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field, offset)


def _octal(field: bytes, offset: int) -> int:
    text = field.strip(b"\0 ") or b"0"
    if text.strip(b"01234567"):  # int() would take a sign, and a negative size walks backwards for ever
        raise ShardError(f"the tar header at byte {offset} is damaged: {field!r} is no octal number")
    return int(text, 8)


def _checksum_fits(header: bytes, offset: int) -> bool:
    # adler32's low half is 1 + the sum of the bytes modulo 65521: in C, where sum() would be half of the time of reading a shard
    total = (zlib.adler32(header) & 0xFFFF) - 1
    return not (total - sum(header[148:156]) + 8 * 32 - _octal(header[148:156], offset)) % 65521


def _header_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":  # GNU keeps times there
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _extension(kind: bytes, data: bytes) -> dict[bytes, bytes]:
    """What a GNU or PAX header says of the next member: ``path``, ``size``, and ``GNU.sparse`` with its true name where it is sparse."""
    if kind == b"L":
        return {b"path": data.partition(b"\0")[0]}
    if kind == b"K":  # where a link leads: none is followed
        return {}
    found = _pax_records(data)
    if kind == b"g" and found:
        raise ShardError(
            f"a global PAX header gives every member the same {', '.join(sorted(k.decode() for k in found))}: make the tar again"
        )
    return found


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """The records of ours in a PAX header: ``LENGTH name=value\\n`` each."""
    offset, found = 0, dict[bytes, bytes]()
    while offset < len(data):
        digits = _RECORD.match(data, offset)
        stop = offset + int(digits[1]) if digits else 0
        if digits is None or not digits.end() < stop <= len(data) or data[stop - 1] != 0x0A:
            raise ShardError("a PAX header is damaged")
        name, _, value = data[digits.end() : stop - 1].partition(b"=")
        if name in (b"path", b"size"):
            found[name] = value
        elif name.startswith(b"GNU.sparse."):
            found[_SPARSE] = value if name == b"GNU.sparse.name" else found.get(_SPARSE, b"")
        offset = stop
    return found


def _end_of_sparse_map(view: memoryview, header: bytes, offset: int) -> int:
    """Where the data of a GNU sparse member begins: behind the blocks that go on with its map, each of which says if one more follows."""
    more = header[482]
    while more:
        if offset + BLOCK > len(view):
            raise ShardError(f"the tar is cut short: the map of a sparse file goes on at byte {offset}, the tar ends at {len(view)}")
        more = view[offset + 504]
        offset += BLOCK
    return offset


def _require_begin(view: memoryview) -> None:
    """The first block must be a header or zeros."""
    if len(view) < BLOCK:
        raise NotATarError(f"no tar: {len(view)} bytes, and a tar has at least {BLOCK}: fetch the file again")
    header = bytes(view[:BLOCK])
    try:
        if header == _ZEROS or _checksum_fits(header, 0):
            return
    except ShardError:  # no octal number where the checksum should be
        pass
    for magic, name in _COMPRESSED.items():
        if header.startswith(magic):
            raise NotATarError(f"no tar but a file compressed by {name}: decompress it first")
    raise NotATarError("no tar: the first header is damaged, or this is another kind of file")


def _require_zeros(view: memoryview, offset: int) -> None:
    """Nothing but zeros may follow the end of the archive. In pieces: a copy of the rest would double the memory."""
    for start in range(offset, len(view), 1 << 20):
        if bytes(view[start : start + (1 << 20)]).strip(b"\0"):
            raise ShardError(f"bytes follow the end-of-archive block at byte {offset}: a header was wiped, or tars were joined")
