"""What a picture file says of itself, read before any decoder sees it: a few bytes that cost gigabytes or minutes are found here.

Pillow and libwebp allocate a WebP's canvas and inflate a PNG's profiles and texts while they open a file; and Pillow walks its chunks in
Python, so that a file of nothing but empty chunks would take minutes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from PIL import Image

MAX_CHUNKS = 10_000
"""Chunks of a PNG; a picture of the largest size, stored in libpng's pieces of 8 KiB, has 6,000."""
MAX_COMPRESSED_CHUNKS = 16
"""Compressed texts and profiles of a PNG: Pillow inflates each one up to 1 MiB."""
MAX_SEGMENTS = 1000
"""Segments before a JPEG's first scan that are looked at."""
_ORIENTATION = 0x0112


def png_problem(data: bytes | memoryview) -> str | None:
    """Why a PNG is not opened: it has too many chunks. None: it may be."""
    offset, chunks, compressed = 8, 0, 0
    while offset + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        chunks, compressed = chunks + 1, compressed + (kind in (b"zTXt", b"iTXt", b"iCCP"))
        if chunks > MAX_CHUNKS or compressed > MAX_COMPRESSED_CHUNKS:
            return f"over {MAX_CHUNKS} chunks, or {MAX_COMPRESSED_CHUNKS} compressed ones, as no picture needs: save it again"
        offset += 12 + size
    return None


def webp_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height of the canvas that a WebP claims, (0, 0) where its first chunk is none of libwebp's."""
    kind, head = bytes(data[12:16]), bytes(data[20:30]).ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    return 0, 0


def jpeg_orientation(data: bytes | memoryview) -> int:
    """The EXIF orientation of a JPEG, 1 to 8. EXIF that is absent or cannot be read asks for none: 1."""
    for marker, payload in _segments(data):
        if marker == 0xE1 and payload.startswith(b"Exif\0\0"):
            exif = Image.Exif()
            try:
                exif.load(payload)
                turn = exif.get(_ORIENTATION, 1)
            except Exception:  # whatever Pillow raises for damaged EXIF; the pixels are judged elsewhere
                return 1
            return turn if isinstance(turn, int) and turn in range(1, 9) else 1
    return 1


def _segments(data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
    """Marker and payload of the segments before a JPEG's first scan."""
    offset = 2
    for _ in range(MAX_SEGMENTS):
        if offset + 4 > len(data) or data[offset] != 0xFF or data[offset + 1] == 0xDA:
            return
        if data[offset + 1] == 0xFF:  # any number of these may stand before a marker
            offset += 1
            continue
        size = int.from_bytes(data[offset + 2 : offset + 4], "big")
        yield data[offset + 1], bytes(data[offset + 4 : offset + 2 + size])
        offset += 2 + size
