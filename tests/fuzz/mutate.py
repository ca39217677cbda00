"""Ways to break a file: bits, lengths, pieces, and edits that keep checksums right, so that the damage reaches the code behind them."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence

INTERESTING = (0, 1, 2, 0x20, 0x2D, 0x30, 0x37, 0x4C, 0x78, 0x7F, 0x80, 0xD8, 0xD9, 0xDA, 0xFF)
SIZES = (0, 1, 3, 111, 112, 113, 511, 512, 4096, 16383, 65500, 65535, 1 << 20, 1 << 24, (1 << 26) + 1, (1 << 31) - 1, (1 << 32) - 1)
TAR_FIELDS = ((0, 100), (124, 136), (124, 136), (148, 156), (156, 157), (156, 157), (345, 500), (482, 512), (0, 512))


def flip_bits(data: bytearray, rng: random.Random) -> None:
    """One to sixteen bits."""
    for _ in range(rng.randint(1, 16) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_bytes(data: bytearray, rng: random.Random) -> None:
    """A few bytes to values that mean something somewhere, mostly near the beginning, where headers are."""
    for _ in range(rng.randint(1, 6) if data else 0):
        data[rng.randrange(min(len(data), rng.choice((40, 700, 1 << 30))))] = rng.choice(INTERESTING)


def truncate(data: bytearray, rng: random.Random) -> None:
    """Everything from some byte on is gone."""
    del data[rng.randrange(len(data) + 1) :]


def cut_out(data: bytearray, rng: random.Random) -> None:
    """A piece is gone."""
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 4, 511, 512, 513, rng.randint(1, 2000)))]


def repeat(data: bytearray, rng: random.Random) -> None:
    """A piece is there several times."""
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((1, 12, 512, 1024, rng.randint(1, 2000)))]
    data[start:start] = piece * rng.randint(1, 5)


def swap(data: bytearray, rng: random.Random) -> None:
    """Two blocks change places."""
    size = rng.choice((4, 16, 512))
    if len(data) >= 2 * size:
        a, b = (rng.randrange(len(data) // size) * size for _ in range(2))
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def set_size(data: bytearray, rng: random.Random) -> None:
    """A number of two or four bytes, either way round, to one that lies."""
    layout = rng.choice(("<H", ">H", "<I", ">I"))
    if len(data) >= 4:
        place = rng.randrange(min(len(data) - 3, rng.choice((60, 700, 1 << 30))))
        struct.pack_into(layout, data, place, rng.choice(SIZES) & (0xFFFF if layout[1] == "H" else 0xFFFFFFFF))


def fill(data: bytearray, rng: random.Random) -> None:
    """A stretch of equal bytes."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((8, 512, 2000)))
    data[start:stop] = bytes([rng.choice(INTERESTING)]) * (stop - start)


def edit_tar(data: bytearray, rng: random.Random) -> None:
    """Header fields of a tar, with a right checksum most times."""
    for _ in range(rng.randint(1, 4) if len(data) >= 512 else 0):
        block = rng.randrange(len(data) // 512) * 512
        field = rng.choice(TAR_FIELDS)
        if rng.random() < 0.3:
            value = rng.choice(
                (b"%011o\0" % rng.choice(SIZES), b"\x80" + bytes(7) + struct.pack(">I", rng.choice(SIZES)), b"-0000000001\0")
            )
            data[block + 124 : block + 136] = value
        elif rng.random() < 0.3:
            data[block + 156] = rng.choice(b"0123456789\0LKxXgSDVM")
        else:
            data[block + rng.randrange(*field)] = rng.choice((*INTERESTING, rng.randrange(256)))
        if rng.random() < 0.9:
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])


def edit_png(data: bytearray, rng: random.Random) -> None:
    """A byte or the dimensions of a PNG, with right checksums."""
    if len(data) < 40 or data[:4] != b"\x89PNG":
        return set_bytes(data, rng)
    if rng.random() < 0.4:
        struct.pack_into(">I", data, rng.choice((16, 20)), rng.choice(SIZES))
    else:
        data[rng.choice((24, 25, 28, rng.randrange(8, len(data))))] = rng.choice((*INTERESTING, 3, 4, 6, 8, 16))
    offset = 8
    while offset + 12 <= len(data):
        stop = offset + 8 + int.from_bytes(data[offset : offset + 4], "big")
        if stop + 4 > len(data):
            break
        struct.pack_into(">I", data, stop, zlib.crc32(data[offset + 4 : stop]))
        offset = stop + 4
    return None


def edit_jpeg(data: bytearray, rng: random.Random) -> None:
    """The dimensions of a JPEG, or a byte just behind one of its markers."""
    frames = [place for place in range(len(data) - 9) if data[place] == 0xFF and data[place + 1] in (0xC0, 0xC1, 0xC2)]
    markers = [place for place in range(len(data) - 12) if data[place] == 0xFF and data[place + 1] > 0xBF]
    if frames and rng.random() < 0.5:
        struct.pack_into(">H", data, rng.choice(frames) + rng.choice((5, 7)), rng.choice(SIZES) & 0xFFFF)
    elif markers:
        data[rng.choice(markers) + rng.randint(1, 11)] = rng.choice((*INTERESTING, rng.randrange(256)))


EVERY: Sequence[Callable[[bytearray, random.Random], None]] = (*(flip_bits, set_bytes, truncate, cut_out, repeat, swap, set_size, fill),)


def mutated(data: bytes, others: Sequence[bytes], rng: random.Random, special: Callable[[bytearray, random.Random], None] | None) -> bytes:
    """A broken copy: one to three changes, sometimes a splice with another file of the corpus, rarely none at all."""
    broken = bytearray(data)
    if rng.random() < 0.1:
        other = rng.choice(others)
        broken[rng.randrange(len(broken) + 1) :] = other[rng.randrange(len(other) + 1) :]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        change = special if special and rng.random() < 0.5 else rng.choice(EVERY)
        change(broken, rng)
    return bytes(broken)
