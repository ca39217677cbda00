"""Small valid files of every kind that is read, from which the fuzzer makes broken ones. The same bytes in every process."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from cluster.shard import Sample, ShardWriter
from tests.cluster.test_record import Written, insightface


def gradient(width: int = 112, height: int = 112) -> Image.Image:
    """RGB, smooth, different in every direction."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green * 0.5, np.where(red > green, 200, 20)], -1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    """EXIF that asks for a rotation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@cache
def pictures() -> Mapping[str, Sequence[bytes]]:
    """Valid pictures by format, of several modes and sizes."""
    face, wide = gradient(), gradient(150, 40)
    sixteen = Image.fromarray(np.asarray(wide.convert("L")).astype(np.uint16) * 257)
    frames = [wide.rotate(angle) for angle in (0, 90)]
    return {
        "jpeg": [
            saved(face, "JPEG", quality=90),
            saved(face.convert("L"), "JPEG"),
            saved(face, "JPEG", progressive=True),
            saved(face, "JPEG", exif=turned(6), comment=b"hello"),
            saved(wide, "JPEG", subsampling=2, exif=turned(3)),
            saved(wide.convert("CMYK"), "JPEG"),
            saved(wide, "JPEG", progressive=True, restart_marker_blocks=2),
        ],
        "png": [
            *(saved(wide.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
            saved(sixteen, "PNG"),
            saved(face, "PNG", exif=turned(8)),
            saved(wide.convert("P"), "PNG", transparency=0, icc_profile=bytes(300)),
            saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        ],
        "webp": [
            saved(face, "WEBP", lossless=True),
            saved(wide, "WEBP", quality=50, exif=turned(5)),
            saved(wide.convert("RGBA"), "WEBP"),
            saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        ],
        "bmp": [saved(face, "BMP"), *(saved(wide.convert(mode), "BMP") for mode in ("L", "P", "1"))],
    }


def tar_of(members: Sequence[tuple[str, bytes]], kind: int, **headers: Any) -> bytes:
    """A tar by Python's tarfile."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, **headers) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def shard(images: Sequence[bytes], source: str | None = None) -> bytes:
    """A tar by our own writer."""
    writer = ShardWriter()
    for number, image in enumerate(images):
        writer.add(Sample(f"k/{number:04d}", image, number // 2, source))
    return writer.finish()


@cache
def tars() -> Sequence[bytes]:
    """Valid tars of every dialect."""
    long = [("d" * 150 + ".jpg", b"1" * 700), ("d" * 150 + ".cls", b"5"), ("ü.jpg", b"22"), ("ü.cls", b"3"), ("ü.json", b'{"source": "s"}')]
    return [
        shard([b"a" * 600, b"b", b"c" * 513], source="origin"),
        shard([bytes(3), b""]),
        tar_of(long, tarfile.GNU_FORMAT),
        tar_of(long, tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}),
        tar_of(long[2:], tarfile.USTAR_FORMAT),
    ]


@cache
def face_tars() -> Sequence[bytes]:
    """Tars of real pictures."""
    every = [image for found in pictures().values() for image in found]
    return [shard(every[:8], source="x"), shard(every[8:16]), tar_of([("a.png", every[8]), ("a.cls", b"1")], tarfile.PAX_FORMAT)]


@cache
def records() -> Sequence[Written]:
    """Valid .rec files, one with images that hold the magic number."""
    jpeg = pictures()["jpeg"]
    split = b"12345678" + b"\x0a\x23\xd7\xce" * 3 + b"tail"
    return [insightface([(i // 2, jpeg[i % 7]) for i in range(6)]), insightface([(i, split[: 9 + i]) for i in range(9)], header=False)]


@cache
def bins() -> Sequence[bytes]:
    """Valid verification files."""
    images = [b"image %d" % i * 20 for i in range(8)]
    return [pickle.dumps((images, [True, False] * 2), protocol) for protocol in (3, 4, 5)]
