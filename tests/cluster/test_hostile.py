"""Everything a stranger may send, through the real ingest: which samples survive with which bytes, and which rows say what is gone."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster import ingest as ingest_module
from cluster.dataset import Dataset, ShardData
from cluster.ingest import IngestProcessor
from cluster.picture import MAX_DECODE_BYTES, decode
from cluster.shard import Sample, read_ledger, read_samples
from cluster.source import open_source
from cluster.tar import MAX_MEMBER_BYTES, read_members
from cluster.verify import verify
from jobs import ingest as ingest_job
from tests.cluster.test_ingest import jpeg
from tests.cluster.test_record import insightface
from tests.cluster.test_shard import END, raw_member
from tests.fuzz.corpus import gradient, saved, turned

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


def ingested(folder: Path, data: bytes, **options: bool) -> ShardData:
    """One tar through fetch and compute."""
    (folder / "their.tar").write_bytes(data)
    source = open_source(str(folder / "their.tar"))
    (unit,) = source.units(100)
    processor = IngestProcessor(source, **options)
    processor.open(1)
    return processor.compute(unit, processor.fetch(unit))


def check(made: ShardData, expected: Expected) -> None:
    """Exactly these samples and rows, in this order, each under a key of ours, and the counts add up."""
    samples = list(read_samples(made.payload)) if made.payload else []
    assert all(isinstance(item, Sample) for item in samples)
    found = {item.key: (bytes(item.image), item.identity) for item in samples if isinstance(item, Sample)}
    found |= {row.key: row.reason for row in made.rejected}  # type: ignore[dict-item]
    assert [found[key] for key in sorted(found)] == expected
    assert sorted(found) == [f"00000-{number:06d}" for number in range(len(expected))]
    assert made.samples == len(samples)
    reasons = Counter(item for item in expected if isinstance(item, str))
    assert {name: n for name, n in made.counts.items() if name.startswith("rejected:")} == {f"rejected:{r}": n for r, n in reasons.items()}
    for item in [*samples, *made.rejected]:
        assert re.fullmatch(r"their\.tar(/[^\x00-\x1f\x7f-\x9f\u2028-\u202e]{0,1014})?", str(item.source)), item.source
    assert all(row.error and len(row.error) < 500 and "\n" not in row.error for row in made.rejected)
    names = [member.name for member in read_members(made.payload)] if made.payload else []
    assert all(re.fullmatch(r"00000-[0-9]{6}\.(jpg|cls|json)", name) for name in names)


@pytest.mark.parametrize("name", CASES)
def test_a_strangers_tar_costs_what_it_must_and_no_more(name: str, tmp_path: Path):
    data, expected = CASES[name]
    check(ingested(tmp_path, data), expected)


def test_the_rows_say_what_happened_and_what_to_do(tmp_path: Path):
    said = {
        "wholes: gzip": "compressed by gzip: decompress it first",
        "wholes: bzip2": "compressed by bzip2",
        "wholes: xz": "compressed by xz",
        "wholes: zip": "compressed by zip",
        "wholes: zero bytes": "0 bytes",
        "wholes: cut in a picture": "fetch the tar again",
        "wholes: two tars joined": "tars were joined",
        "not_files: symlink, size field lies": "a symbolic link, not a regular file: make the tar again with files only",
        "not_files: PAX sparse 1.0": "a sparse file",
        "sizes: over the limit": f"the limit is {MAX_MEMBER_BYTES}",
        "names: global PAX path": "gives every member the same path",
        "names: over 64 KiB": "the limit is 65536",
        "labels: label b'-1'": "no integer from 0 to 2**63 - 1: b'-1'",
    }
    for name, text in said.items():
        (row,) = ingested(tmp_path, CASES[name][0]).rejected
        assert text in row.error, name


@pytest.mark.parametrize("options", [["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))])
def test_no_byte_of_a_sparse_file_becomes_a_picture(options: list[str], tmp_path: Path):
    """Made by GNU tar itself, its map and data being what our reader must pass over."""
    if shutil.which("tar") is None:
        pytest.skip("no tar program")
    folder = tmp_path / "in"
    folder.mkdir()
    for name, number in (("a", 1), ("z", 2)):
        (folder / f"{name}.jpg").write_bytes(jpeg(number))
        (folder / f"{name}.cls").write_text(str(number))
    (folder / "m.cls").write_text("3")
    with (folder / "m.jpg").open("wb") as file:
        for hole in range(60):  # more than the header's own map holds
            file.seek(hole * 100_000)
            file.write(jpeg(3))
        file.truncate(9_000_000)
    files = ["a.jpg", "a.cls", "m.jpg", "m.cls", "z.jpg", "z.cls"]
    subprocess.run(
        ["tar", "--sparse", *options, "-cf", str(tmp_path / "x.tar"), "-C", str(folder), *files], check=True, env={"PATH": "/usr/bin:/bin"}
    )
    data = (tmp_path / "x.tar").read_bytes()
    assert len(data) < 5_000_000, "the file system keeps holes"
    check(ingested(tmp_path, data), around("not-a-file"))


def test_a_tar_of_very_many_tiny_members_has_a_ledger_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ingest_module, "MAX_ROWS", 1000)
    tiny = raw_member(b"a.txt", b"")
    made = ingested(tmp_path, face(b"first", 1) + tiny * 20_000 + face(b"last", 2) + END)
    assert (made.samples, len(made.rejected)) == (2, 1001)
    assert (made.rejected[-1].reason, made.rejected[-1].num_samples) == ("not-listed", 19_000)
    assert sum(row.num_samples for row in made.rejected) == made.counts["rejected:no-image"] == 20_000


def test_what_would_make_a_shard_larger_than_any_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = jpeg(3)
    monkeypatch.setattr(ingest_module, "MAX_SHARD_BYTES", 2 * (len(image) + 4096))
    made = ingested(tmp_path, b"".join(face(b"%d" % i, 3) for i in range(4)) + END)
    assert [made.samples, *(row.reason for row in made.rejected)] == [2, "shard-full", "shard-full"]
    assert len(made.payload or b"") < ingest_module.MAX_SHARD_BYTES + len(END)


@pytest.mark.scale
def test_a_million_tiny_members_cost_seconds_and_a_bounded_ledger(tmp_path: Path):
    made = ingested(tmp_path, raw_member(b"a.txt", b"") * 1_000_000 + END)
    assert (len(made.rejected), made.counts["rejected:no-image"]) == (100_001, 1_000_000)


# --- pictures ---


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, depth: int = 1, colour: int = 0) -> bytes:
    """A PNG whose header claims a size, and chunks before its (missing) pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def webp(kind: bytes, body: bytes) -> bytes:
    piece = kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(piece)) + b"WEBP" + piece


def claiming(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def bmp(width: int, height: int, compression: int, pixels: bytes) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(pixels), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(pixels), 0, 0, 54 + 1024) + header + bytes(1024) + pixels


FACE = gradient()
PLAIN = saved(FACE, "JPEG", quality=95)
PROGRESSIVE = saved(FACE, "JPEG", quality=95, progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.rfind(b"\xff\xda") : -2]


def refused_pictures() -> dict[str, tuple[bytes, str]]:
    """With --resize, so that no size alone is a reason."""
    large = saved(gradient(150, 130), "JPEG", quality=95)
    cmyk = saved(gradient(150, 130).convert("CMYK"), "JPEG")
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1 << 20)))
    return {
        "zero bytes": (b"", "empty-file"),
        "text": (b"GIF89a is no picture here", "not-an-image"),
        "JPEG bomb": (claiming(PLAIN, 65_500, 65_500), "too-large"),
        "progressive JPEG bomb": (claiming(PROGRESSIVE, 65_500, 65_500), "too-large"),
        "JPEG of too many scans": (PROGRESSIVE[:-2] + SCAN * 2000 + b"\xff\xd9", "too-large"),
        "PNG bomb, just over": (png(4096, 4097), "too-large"),
        "PNG bomb, where Pillow warns": (png(10_000, 10_000), "too-large"),
        "PNG bomb, where Pillow refuses": (png(100_000, 100_000), "too-large"),
        "PNG bomb, largest": (png(2**31 - 1, 2**31 - 1, depth=16, colour=6), "too-large"),
        "PNG of profiles": (png(112, 112, *[profile] * 500), "too-large"),
        "PNG of texts": (png(112, 112, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20)))] * 500), "too-large"),
        "PNG of empty chunks": (png(112, 112, chunk(b"abCd", b"") * 1_000_000), "too-large"),
        "WebP bomb, extended": (webp(b"VP8X", bytes(4) + b"\xff" * 6), "too-large"),
        "WebP bomb, lossless": (webp(b"VP8L", b"\x2f" + b"\xff" * 30), "too-large"),
        "WebP bomb, lossy": (webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + b"\xff\x3f\xff\x3f" + bytes(30)), "too-large"),
        "BMP bomb": (bmp(20_000, 20_000, 0, b""), "too-large"),
        "BMP, run-length bomb": (bmp(1 << 24, 1, 1, b"\0\2\0\xff" * 10), "not-an-image"),
        "JPEG cut": (large[: len(large) // 2], "damaged-image"),
        "JPEG cut and ended again": (large[: len(large) // 2] + b"\xff\xd9", "damaged-image"),
        "aligned JPEG cut and ended again": (PLAIN[: len(PLAIN) // 2] + b"\xff\xd9", "damaged-image"),
        "turned JPEG cut and ended again": (
            (lambda d: d[: len(d) // 2] + b"\xff\xd9")(saved(FACE, "JPEG", exif=turned(6))),
            "damaged-image",
        ),
        "CMYK cut and ended again": (cmyk[: len(cmyk) // 2] + b"\xff\xd9", "damaged-image"),
        "progressive cut and ended again": (PROGRESSIVE[:900] + b"\xff\xd9", "damaged-image"),
        "PNG cut": ((lambda d: d[: len(d) // 2])(saved(FACE, "PNG")), "not-an-image"),
        "WebP cut": (saved(FACE, "WEBP", lossless=True)[:-300], "not-an-image"),
    }


def folder_of(root: Path, files: dict[str, bytes]) -> dict[str, str]:
    """Write pictures into one identity's folder. Returns their names by case."""
    (root / "id").mkdir(parents=True)
    written = {f"id/{number:03d}.jpg": case for number, case in enumerate(files)}
    for name, case in written.items():
        (root / name).write_bytes(files[case])
    return written


def ingest_folder(root: Path, **options: bool) -> ShardData:
    source = open_source(str(root))
    (unit,) = source.units(1000)
    processor = IngestProcessor(source, **options)
    processor.open(1)
    return processor.compute(unit, processor.fetch(unit))


def test_bombs_and_damaged_pictures_are_rows_in_our_words(tmp_path: Path):
    cases = refused_pictures()
    names = folder_of(tmp_path, {name: data for name, (data, _) in cases.items()})
    made = ingest_folder(tmp_path, resize=True)
    assert {names[str(row.source)]: row.reason for row in made.rejected} == {name: reason for name, (_, reason) in cases.items()}
    assert made.samples == 0
    for row in made.rejected:
        assert not re.search(r"decompression bomb|DOS attack|MemoryError|0x[0-9a-f]{6}", row.error), row
        if row.reason == "too-large":
            assert re.search(r"limit|as no picture needs|scans", row.error), row
    assert not [row for row in ingest_folder(tmp_path).rejected if row.reason not in {"wrong-size", *dict(cases.values()).values()}]


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray, bool]]:
    """Data, what it shows as uint8 (112, 112, 3), and whether it is kept byte for byte."""
    grey = FACE.convert("L")
    deep = np.asarray(FACE).astype(">u2") * 257
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 112, 112, 16, 2, 0, 0, 0))
    cmyk = saved(FACE.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe")
    plain_cmyk = cmyk[: adobe - 4] + cmyk[adobe + 12 :]  # without the marker the values are not inverted
    ycck = cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :]
    other = FACE.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    palette = FACE.convert("P")
    clear = FACE.convert("RGBA")
    clear.putalpha(Image.new("L", (112, 112), 0))
    small_exif = turned(1)
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    return {
        "aligned": (PLAIN, rgb(FACE), True),
        "progressive": (PROGRESSIVE, rgb(FACE), True),
        "grey": (saved(grey, "JPEG", quality=95), rgb(grey), True),
        "trailing garbage": (PLAIN + b"garbage" * 99, rgb(FACE), True),
        "a second picture behind": (PLAIN + saved(other, "JPEG"), rgb(FACE), True),
        "a thumbnail inside": (
            saved(FACE, "JPEG", quality=95, exif=small_exif.tobytes() + saved(other.resize((40, 40)), "JPEG")),
            rgb(FACE),
            True,
        ),
        "CMYK": (cmyk, rgb(Image.open(io.BytesIO(cmyk))), False),
        "CMYK that is not Adobe's": (plain_cmyk, rgb(Image.open(io.BytesIO(plain_cmyk))), False),
        "YCCK": (ycck, rgb(Image.open(io.BytesIO(ycck))), False),
        "16-bit grey PNG": (saved(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG"), rgb(grey), False),
        "16-bit RGB PNG": (b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""), rgb(FACE), False),
        "PNG named jpg": (saved(FACE, "PNG"), rgb(FACE), False),
        "animated PNG": (saved(FACE, "PNG", save_all=True, append_images=[other]), rgb(FACE), False),
        "animated WebP": (saved(FACE, "WEBP", save_all=True, append_images=[other], lossless=True), rgb(FACE), False),
        "palette with transparency": (saved(palette, "PNG", transparency=5), rgb(palette), False),
        "fully transparent": (saved(clear, "PNG"), rgb(FACE), False),
        **{
            f"EXIF rotation {turn}": (
                saved(FACE.transpose(Image.Transpose(code)), "JPEG", quality=95, exif=turned(turn)),
                rgb(FACE),
                False,
            )
            for turn, code in inverse.items()
        },
    }


def test_odd_pictures_show_what_they_show_elsewhere(tmp_path: Path):
    cases = odd_pictures()
    names = folder_of(tmp_path, {name: data for name, (data, _, _) in cases.items()})
    made = ingest_folder(tmp_path)
    assert not made.rejected
    for sample in read_samples(made.payload or b""):
        assert isinstance(sample, Sample)
        data, shows, kept = cases[names[str(sample.source)]]
        assert (bytes(sample.image) == data) == kept, names[str(sample.source)]
        assert np.abs(decode(sample.image).astype(int) - shows).mean() < 5, names[str(sample.source)]  # a palette is dithered
    assert made.samples == len(cases)


def test_one_pixel_is_resized_or_named(tmp_path: Path):
    names = folder_of(tmp_path, {kind: saved(gradient(1, 1), kind) for kind in ("JPEG", "PNG", "BMP", "WEBP")})
    assert [row.reason for row in ingest_folder(tmp_path).rejected] == ["wrong-size"] * len(names)
    assert ingest_folder(tmp_path, resize=True).samples == len(names)


WORST = """
import re, sys
from cluster.picture import align

def peak():
    return int(re.search("VmHWM:\\s+([0-9]+) kB", open("/proc/self/status").read())[1])

large, small = (open(path, "rb").read() for path in sys.argv[1:])
align(small, resize=True)  # code and tables are loaded
before = peak()
align(large, resize=True)
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "JPEG"])
def test_the_largest_pictures_stay_within_the_stated_memory(kind: str, tmp_path: Path):
    image = Image.effect_noise((64, 64), 90).resize((4096, 4096), Image.Resampling.NEAREST).convert("RGB" if kind == "JPEG" else "RGBA")
    options: dict[str, Any] = {"WEBP": {"lossless": True, "method": 0}, "PNG": {"compress_level": 1}, "JPEG": {"progressive": True}}[kind]
    data = saved(image, kind, exif=turned(6), **options)
    files = [tmp_path / "large", tmp_path / "small"]
    for file, content in zip(files, (data, saved(gradient(150, 90), kind)), strict=True):
        file.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", WORST, *map(str, files)], capture_output=True, check=True)
    assert 50 << 10 < int(done.stdout) < MAX_DECODE_BYTES >> 10  # KiB; the lower bound: it was decoded


# --- the whole stage ---


def test_a_folder_of_hostile_tars_through_the_whole_job(tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture[str]):
    """Every case at once, on workers, into a data set that verifies; no stranger's name in a key, a path or a line of output."""
    (tmp_path / "in").mkdir()
    cases = {name: case for name, case in CASES.items() if name != "sizes: over the limit"}  # 64 MiB, tested above
    for number, (data, _) in enumerate(cases.values()):
        (tmp_path / "in" / f"{number:03d}.tar").write_bytes(data)
    out = tmp_path / "out"
    assert ingest_job.main(["--source", str(tmp_path / "in"), "--output", str(out), "--num-workers", "2"]) == 0
    shown = capfd.readouterr()
    dataset = Dataset(str(out))
    found = verify(dataset.url)
    assert found.ok, (found.problems, found.strays)
    expected = [item for _, items in cases.values() for item in items]
    reasons = Counter(item for item in expected if isinstance(item, str))
    samples = [item for item in expected if not isinstance(item, str)]
    assert (found.totals["samples"], found.totals["quarantined"]) == (len(samples), reasons.total())
    for number, (manifest, (name, (_, items))) in enumerate(zip(dataset.manifests(), cases.items(), strict=True)):
        rows = read_ledger(dataset.store.get(manifest.ledger)) if manifest.ledger else []
        here = {row.key: row.reason for row in rows}
        here |= {i.key: (bytes(i.image), i.identity) for i in read_samples(dataset.read(manifest))} if manifest.file else {}  # type: ignore[union-attr]
        assert [here[key] for key in sorted(here)] == items, name
        assert sorted(here) == [f"{number:05d}-{i:06d}" for i in range(len(items))]
    assert f"left out: {reasons.most_common(1)[0][1]} {reasons.most_common(1)[0][0]}, " in shown.out
    assert all(f"{count} {reason}" in shown.out for reason, count in reasons.items())
    paths = [str(path.relative_to(out)) for path in out.rglob("*")]
    pattern = (
        r"(dataset|index)\.json|shards|manifests|quarantine|attempts|(shards|manifests|quarantine|attempts)/[0-9a-f-]+\.(tar|json|parquet)"
    )
    assert all(re.fullmatch(pattern, path) for path in paths)
    for text in (shown.out, shown.err):
        assert not any(word in text for word in ("evil", "secrets leaked", "passwd", "\x1b[2J", "Traceback"))


def test_the_cases_are_many_and_each_reason_is_among_them():
    assert len(CASES) > 80
    reasons = {item for _, items in CASES.values() for item in items if isinstance(item, str)}
    assert reasons == {"not-a-file", "truncated-tar", "too-large", "no-label", "no-image", "bad-label", "empty-file", "not-a-tar"}


def test_the_reader_agrees_with_tarfile_where_tarfile_reads_on():
    """The corpus's well-formed tars, member by member: what both read must have the same name and bytes."""
    compared = 0
    for name, (data, _) in CASES.items():
        try:
            ours = [(m.name, bytes(m.data)) for m in read_members(data) if not m.problem]
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                theirs = [(i.name, archive.extractfile(i).read()) for i in archive if i.type in (b"0", b"\0") and not i.issparse()]  # type: ignore[union-attr]
        except (ValueError, tarfile.TarError):  # ShardError is one, and tarfile's map of a sparse file that is none
            continue
        if "over the limit" in name or "NUL" in name or "two tars" in name:
            continue
        assert ours == theirs, name
        compared += 1
    assert compared > 40


def test_a_strangers_rec_costs_the_records_that_are_damaged(tmp_path: Path):
    written = insightface([(i // 2, jpeg(i)) for i in range(1, 13)])
    data, starts = bytearray(written.rec), written.starts
    data[starts[2]] ^= 1  # the magic number
    struct.pack_into("<I", data, starts[4] + 4, 1 << 28)  # a length past the end
    data[starts[5] + 8 : starts[6]] = bytes(starts[6] - starts[5] - 8)  # label 0, and zeros for a picture
    struct.pack_into("<I", data, starts[7] + 4, 30)  # a length that ends in the picture
    struct.pack_into("<I", data, starts[8] + 8, 1 << 20)  # more labels than there are bytes
    struct.pack_into("<f", data, starts[9] + 12, -7.0)
    data[starts[11] + 7] |= 1 << 5  # the first part of a record that never goes on
    costs = {
        2: "damaged-record",
        4: "damaged-record",
        5: "not-an-image",
        7: "damaged-record",
        8: "bad-label",
        9: "bad-label",
        11: "damaged-record",
    }
    (tmp_path / "train.rec").write_bytes(bytes(data))
    (tmp_path / "train.idx").write_bytes(written.idx)
    source = open_source(str(tmp_path / "train.rec"))
    processor = IngestProcessor(source)
    processor.open(1)
    made = [processor.compute(unit, processor.fetch(unit)) for unit in source.units(5)]
    found: dict[str, Any] = {row.key: row.reason for part in made for row in part.rejected}
    for item in itertools.chain(*(read_samples(part.payload or b"") for part in made)):
        assert isinstance(item, Sample)
        found[item.key] = (bytes(item.image), item.identity)
    assert [found[key] for key in sorted(found)] == [costs.get(i, (jpeg(i), i // 2)) for i in range(1, 13)]
    assert [part.samples for part in made] == [2, 2, 1]
