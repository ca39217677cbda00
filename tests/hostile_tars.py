"""What a stranger may send in a tar: made by hand, with what each case must cost."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile

import numpy as np

from cluster.tar import MAX_MEMBER_BYTES
from tests.cluster.test_ingest import jpeg
from tests.tars import END, raw_member

Expected = list[tuple[bytes, int] | str]
"""In order: (image, identity) of a sample that survives, or the reason of a row."""


def face(name: bytes, number: int) -> bytes:
    """Members of a good sample: picture ``number``, identity ``number``."""
    return raw_member(name + b".jpg", jpeg(number)) + raw_member(name + b".cls", b"%d" % number)


def good(number: int) -> tuple[bytes, int]:
    return jpeg(number), number


def between(*members: bytes) -> bytes:
    """The members between two good samples: what they cost must be no more than themselves."""
    return face(b"first", 1) + b"".join(members) + face(b"last", 2) + END


def around(*middle: tuple[bytes, int] | str) -> Expected:
    return [good(1), *middle, good(2)]


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """A PAX header."""
    data = b""
    for name, value in records:
        body = b" " + name + b"=" + value + b"\n"
        size = next(n for n in range(len(body), len(body) + 20) if n == len(body) + len(str(n)))
        data += str(size).encode() + body
    return raw_member(b"pax", data, kind)


def gnu_sparse(data: bytes, maps: int) -> bytes:
    """A sparse member of GNU's old format whose map goes on for ``maps`` more blocks."""
    header = bytearray(raw_member(b"sparse.jpg", b"", b"S", size=b"%011o" % len(data)))
    header[482] = maps > 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    blocks = b"".join(bytes(504) + bytes([i < maps - 1]) + bytes(7) for i in range(maps))
    return bytes(header) + blocks + data + bytes(-len(data) % 512)


def base256(size: int) -> bytes:
    return b"\x80" + size.to_bytes(11, "big")


def named(name: bytes, number: int = 5) -> bytes:
    """A good sample whose name comes by PAX, where it may hold anything."""
    return (
        pax((b"path", name + b".jpg")) + raw_member(b"x", jpeg(number)) + pax((b"path", name + b".cls")) + raw_member(b"x", b"%d" % number)
    )


EVIL = b"evil\nERROR root:core:1 secrets leaked"
LABEL_LESS = raw_member(b"m.jpg", jpeg(3))
TEXT = raw_member(b"m.txt", b"hello")


def not_files() -> dict[str, tuple[bytes, Expected]]:
    kinds = {b"1": "hard link", b"2": "symlink", b"3": "character device", b"4": "block device", b"6": "fifo"}
    cases = {
        f"{name}, size field lies": (between(raw_member(b"m.jpg", b"", kind, size=b"%011o" % 5000)), around("not-a-file"))
        for kind, name in kinds.items()
    }
    for kind in (b"7", b"D", b"M", b"N", b"V", b"A", b"\xfe"):
        cases[f"type {kind!r} with data"] = (between(raw_member(b"m.jpg", jpeg(3), kind)), around("not-a-file"))
    label = raw_member(b"m.cls", b"3")
    return {
        **cases,
        "a link and its label are one row": (between(raw_member(b"m.jpg", b"", b"2"), label), around("not-a-file")),
        "a linked label": (between(LABEL_LESS, raw_member(b"m.cls", b"", b"1")), around("not-a-file")),
        "a linked extra costs nothing": (between(face(b"m", 3), raw_member(b"m.txt", b"", b"2")), around(good(3))),
        "GNU sparse": (between(gnu_sparse(jpeg(3), 0)), around("not-a-file")),
        "GNU sparse with a long map": (between(gnu_sparse(jpeg(3), 3)), around("not-a-file")),
        "GNU sparse without end": (face(b"first", 1) + gnu_sparse(b"", 3)[: 3 * 512], [good(1), "truncated-tar"]),
        "PAX sparse 0.0": (between(pax((b"GNU.sparse.size", b"9999")), face(b"m", 3)), around("not-a-file")),
        "PAX sparse 1.0": (
            between(
                pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"m.jpg"), (b"path", b"x/m.jpg")),
                face(b"m", 3),
            ),
            around("not-a-file"),
        ),
        "a folder": (between(raw_member(b"m/", b"", b"5", size=b"%011o" % 700)), around()),
        "an old folder": (between(raw_member(b"m/", b"", b"\0", size=b"%011o" % 700)), around()),
    }


def sizes() -> dict[str, tuple[bytes, Expected]]:
    image = jpeg(3)
    padded = image + bytes(-len(image) % 512)
    label = raw_member(b"m.cls", b"3")
    true = pax((b"size", b"%d" % len(image)))
    small = raw_member(b"m.jpg", b"", size=b"%011o" % 0)
    return {
        "base-256 size": (between(raw_member(b"m.jpg", image, size=base256(len(image))), label), around(good(3))),
        "base-256, absurd": (between(raw_member(b"m.jpg", image, size=base256(1 << 80)), label), [good(1), "truncated-tar"]),
        "base-256, negative": (between(raw_member(b"m.jpg", image, size=b"\xff" * 12), label), [good(1), "truncated-tar"]),
        "no octal digits": (between(raw_member(b"m.jpg", image, size=b"-0000000700"), label), [good(1), "truncated-tar"]),
        "PAX size, header says 0": (between(true, small, padded, label), around(good(3))),
        "PAX size, header says more": (between(true, raw_member(b"m.jpg", b"", size=b"%011o" % 9000), padded, label), around(good(3))),
        "PAX size past the end": (between(pax((b"size", b"99999999")), small, padded, label), [good(1), "truncated-tar"]),
        "PAX size of 21 digits": (between(pax((b"size", b"9" * 21)), small, padded, label), [good(1), "truncated-tar"]),
        "PAX size no number": (between(pax((b"size", b"-5")), small, padded, label), [good(1), "truncated-tar"]),
        "endless": (between() + raw_member(b"m.jpg", b"", size=b"77777777777"), [*around(), "truncated-tar"]),
        "endless, no end block": (between()[: -len(END)] + raw_member(b"m.jpg", b"", size=b"77777777777"), [*around(), "truncated-tar"]),
        "overlapping: swallows its label": (
            between(raw_member(b"m.jpg", b"", size=b"%011o" % (len(padded) + 1024)), padded, label),
            around("no-label"),
        ),
        "too short: the rest is no header": (
            between(raw_member(b"m.jpg", b"", size=b"%011o" % 5), padded, label),
            [good(1), "truncated-tar"],
        ),
        "over the limit": (
            between(raw_member(b"m.jpg", b"", size=b"%011o" % (MAX_MEMBER_BYTES + 1)), bytes(MAX_MEMBER_BYTES + 512), label),
            around("too-large"),
        ),
    }


def names() -> dict[str, tuple[bytes, Expected]]:
    return {
        "..": (between(named(b"../../../etc/cron.d/x")), around(good(5))),
        "absolute": (between(named(b"/etc/passwd")), around(good(5))),
        "NUL": (between(named(b"a\0b")), around(good(5))),
        "a line end": (between(named(EVIL)), around(good(5))),
        "terminal codes": (between(named(b"\x1b[2J\x1b]0;x\x07")), around(good(5))),
        "no UTF-8": (between(named(b"\xff\xfe"), named(b"\xff\xfd", 6)), around(good(5), good(6))),
        "turned around": (between(named("\u202egpj".encode())), around(good(5))),
        "empty": (between(named(b"")), around(good(5))),
        "60 KiB": (between(named(b"n" * 60_000)), around(good(5))),
        "over 64 KiB": (between(named(b"n" * 66_000)), [good(1), "truncated-tar"]),
        "GNU long name": (between(raw_member(b"l", b"d/" * 300 + b"m.jpg\0", b"L"), raw_member(b"x", jpeg(3))), around("no-label")),
        "GNU long name over 64 KiB": (between(raw_member(b"l", b"n" * 66_000, b"L"), face(b"m", 3)), [good(1), "truncated-tar"]),
        "GNU long link": (
            between(raw_member(b"k", b"t" * 300, b"K"), raw_member(b"m.jpg", b"", b"2"), face(b"n", 3)),
            around("not-a-file", good(3)),
        ),
        "a key twice in a row": (between(face(b"m", 3), face(b"m", 4)), around(good(3), good(4))),
        "a key twice, not in a row": (between(face(b"m", 3), face(b"n", 4), face(b"m", 5)), around(good(3), good(4), good(5))),
        "a key with two .jpg": (between(LABEL_LESS, face(b"m", 4)), around("no-label", good(4))),
        "a key with .jpg and .png": (between(raw_member(b"m.png", b"x"), face(b"m", 4)), around(good(4))),
        "no dot in a name": (between(raw_member(b"m", jpeg(3))), around("no-image")),
        "a key with thousands of members": (between(*(raw_member(b"m.%d" % i, b"1") for i in range(3000)), face(b"m", 3)), around(good(3))),
        "global PAX comment": (between(pax((b"comment", b"hello"), kind=b"g"), face(b"m", 3)), around(good(3))),
        "global PAX path": (between(pax((b"path", b"same.jpg"), kind=b"g"), face(b"m", 3)), [good(1), "truncated-tar"]),
        "global PAX size": (between(pax((b"size", b"5"), kind=b"g"), face(b"m", 3)), [good(1), "truncated-tar"]),
        "PAX record without end": (between(raw_member(b"p", b"10 path=ab", b"x"), face(b"m", 3)), [good(1), "truncated-tar"]),
    }


def labels() -> dict[str, tuple[bytes, Expected]]:
    wrong = [b"-1", b"9223372036854775808", b"1e3", b"", b"one", b"9" * 60, b"\0", "٣".encode()]
    cases = {f"label {text[:20]!r}": (between(LABEL_LESS, raw_member(b"m.cls", text)), around("bad-label")) for text in wrong}
    largest = raw_member(b"m.cls", b"%d" % (2**63 - 1))
    return {
        **cases,
        "largest label": (between(LABEL_LESS, largest), around((jpeg(3), 2**63 - 1))),
        "no label": (between(LABEL_LESS), around("no-label")),
        "no image": (between(TEXT, raw_member(b"m.cls", b"3")), around("no-image")),
        "two labels": (between(face(b"m", 3), raw_member(b"m.cls", b"4")), around(good(3), "no-image")),
        "JSON of nests": (between(face(b"m", 3), raw_member(b"m.json", b"[" * 500_000)), around(good(3))),
        "an image of no bytes": (between(raw_member(b"m.jpg", b""), raw_member(b"m.cls", b"3")), around("empty-file")),
    }


def wholes() -> dict[str, tuple[bytes, Expected]]:
    tar = between()
    zipped = io.BytesIO()
    zipfile.ZipFile(zipped, "w").writestr("a.jpg", bytes(600))
    return {
        "good": (tar, around()),
        "empty tar": (END, []),
        "one end block": (bytes(512), []),
        "zero bytes": (b"", ["not-a-tar"]),
        "a few bytes": (b"hello", ["not-a-tar"]),
        "text": (b"not a tar\n" * 200, ["not-a-tar"]),
        "gzip": (gzip.compress(tar + bytes(range(256)) * 9), ["not-a-tar"]),
        "bzip2": (bz2.compress(np.random.default_rng(0).bytes(3000)), ["not-a-tar"]),
        "xz": (lzma.compress(np.random.default_rng(0).bytes(3000)), ["not-a-tar"]),
        "zip": (zipped.getvalue(), ["not-a-tar"]),
        "first header damaged": (b"\1" + tar[1:], ["not-a-tar"]),
        "only bad samples": (LABEL_LESS + TEXT + raw_member(b"n.jpg", b"", b"2") + END, ["no-label", "not-a-file"]),
        "two tars joined": (tar + tar, [*around(), "truncated-tar"]),
        "a hole where a header was": (face(b"first", 1) + bytes(512) + face(b"last", 2) + END, [good(1), "truncated-tar"]),
        "cut in a picture": (between()[:-2500], [good(1), "truncated-tar"]),
        "no end": (face(b"first", 1), [good(1), "truncated-tar"]),
        "padding of zeros": (tar + bytes(1 << 20), around()),
    }


CASES = {f"{group.__name__}: {name}": case for group in (not_files, sizes, names, labels, wholes) for name, case in group().items()}
