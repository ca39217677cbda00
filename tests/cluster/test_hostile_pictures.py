"""Every picture a stranger may send, through the real ingest: bombs and damage are rows, odd ones show what they show elsewhere."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.dataset import ShardData
from cluster.ingest import IngestProcessor
from cluster.picture import MAX_DECODE_BYTES, decode
from cluster.shard import Sample, read_samples
from cluster.source import open_source
from tests.fuzz.corpus import gradient, saved, turned


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


LARGEST: dict[str, dict[str, Any]] = {
    "WEBP": {"lossless": True, "method": 0},
    "PNG": {"compress_level": 1},
    "JPEG": {"progressive": True},
}


@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_pictures_stay_within_the_stated_memory(kind: str, tmp_path: Path):
    image = Image.effect_noise((64, 64), 90).resize((4096, 4096), Image.Resampling.NEAREST).convert("RGB" if kind == "JPEG" else "RGBA")
    data = saved(image, kind, exif=turned(6), **LARGEST[kind])
    files = [tmp_path / "large", tmp_path / "small"]
    for file, content in zip(files, (data, saved(gradient(150, 90), kind)), strict=True):
        file.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", WORST, *map(str, files)], capture_output=True, check=True)
    assert 50 << 10 < int(done.stdout) < MAX_DECODE_BYTES >> 10  # KiB; the lower bound: it was decoded
