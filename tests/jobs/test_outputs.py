"""A protected set carries nothing of the originals but the label: no metadata, no name, no key, no pixel."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

import facemae.model  # noqa: F401  # registers the architectures
from cluster.dataset import Dataset
from cluster.picture import JPEG_QUALITY, decode, encode
from cluster.shard import read_members, read_samples
from cluster.verify import verify
from facemae.masking import random_mask
from facemae.synthetic import SyntheticFaces
from jobs import ingest, protect
from tests.jobs.test_rekey import objects, samples
from tests.training import initial

SECRET = "77ab" * 16
COPIED = 0.5
"""A block of an output is copied when it correlates more than this with the original's: of 192 independent numbers no block would (seven
standard deviations), and a copy at a tenth of the contrast still does."""


@dataclass(frozen=True)
class Marked:
    """A JPEG with all that a camera, an editor and a careless program put beside the pixels, and the bytes to look for."""

    data: bytes
    marks: Sequence[bytes]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def marked(picture: np.ndarray, number: int) -> Marked:
    """EXIF with GPS and a thumbnail, XMP, an ICC profile, a comment, a JFIF thumbnail, and bytes after the end."""
    file, small, token = io.BytesIO(), io.BytesIO(), f"{number:02d}-4f2e"
    Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
    Image.fromarray(picture[::4, ::4]).save(small, "JPEG", quality=40, comment=f"thumbnail {token}")
    latitude = struct.pack("<6I", 48, 1, number + 3, 1, 7919 + number, 1000)
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><creator>photographer {token}</creator></x:xmpmeta>".encode()
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    jfif = b"JFIF\0" + struct.pack(">HBHHBB", 0x0102, 0, 1, 1, 8, 8) + picture[:64:8, :64:8].tobytes()
    comment, tail = f"comment {token}".encode(), f"trailing bytes {token}".encode() * 3
    parts = [segment(0xE0, jfif), segment(0xE1, b"Exif\0\0" + exif(f"camera {token}".encode(), latitude, small.getvalue()))]
    parts += [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp), segment(0xE2, b"ICC_PROFILE\0\1\1" + icc), segment(0xFE, comment)]
    plain = file.getvalue()
    rest = plain[4 + struct.unpack(">H", plain[4:6])[0] :]  # after PIL's own APP0
    marks = [f"camera {token}".encode(), latitude, small.getvalue()[:400], xmp, icc[100:200], comment, jfif[-96:], tail]
    return Marked(b"\xff\xd8" + b"".join(parts) + rest + tail, [*marks, token.encode()])


def exif(model: bytes, latitude: bytes, thumbnail: bytes) -> bytes:
    """A TIFF of two directories and a GPS one: model and GPS position; then the thumbnail."""
    text, gps, second = 8 + 30, 8 + 30 + 32, 8 + 30 + 32 + 30 + 24
    image = second + 30
    first = (
        struct.pack("<H", 2)
        + struct.pack("<HHII", 0x0110, 2, 32, text)
        + struct.pack("<HHII", 0x8825, 4, 1, gps)
        + struct.pack("<I", second)
    )
    position = struct.pack("<HHHI4s", 2, 1, 2, 2, b"N\0\0\0") + struct.pack("<HHII", 2, 5, 3, gps + 30) + struct.pack("<I", 0)
    last = struct.pack("<HHHII", 2, 0x0201, 4, 1, image) + struct.pack("<HHII", 0x0202, 4, 1, len(thumbnail)) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + first + model.ljust(32, b"\0") + position + latitude + last + thumbnail


class Outputs:
    """Marked JPEGs of three people, ingested, and protected three ways."""

    def __init__(self, folder: Path) -> None:
        rng, drawn = np.random.default_rng(0), SyntheticFaces(3, 4).render(range(12))
        pictures = np.clip(drawn * 0.5 + rng.integers(0, 128, drawn.shape), 0, 255).astype(np.uint8)  # no flat block anywhere
        self.files = [marked(picture, number) for number, picture in enumerate(pictures)]
        for number, file in enumerate(self.files):
            path = folder / "source" / f"surname-{number // 4}" / f"holiday-{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.data[:-900] if number == 7 else file.data)  # one is damaged: a ledger has a row of it
        initial().save_pretrained(folder / "weights")
        (folder / "rekey-secret").write_text(SECRET)
        self.original = str(folder / "originals")
        ingest.run(ingest.IngestConfig(source=str(folder / "source"), output=self.original, shard_size=6, num_workers=1))
        self.facemae, self.released, self.none = (str(folder / name) for name in ("facemae", "released", "none"))
        shared: dict[str, Any] = {"input": self.original, "num_workers": 1}
        model: dict[str, Any] = {"weights": str(folder / "weights"), "seed": 2, "device": "cpu"}
        protect.run(protect.ProtectConfig(output=self.facemae, **shared, **model))
        protect.run(protect.ProtectConfig(output=self.released, rekey=f"file:{folder}/rekey-secret", **shared, **model))
        protect.run(protect.ProtectConfig(output=self.none, method="none", **shared))
        self.folder = folder


@pytest.fixture(scope="module")
def outputs(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    return Outputs(tmp_path_factory.mktemp("outputs"))


def test_the_pictures_are_what_they_are_made_to_be(outputs: Outputs) -> None:
    for file in outputs.files:
        image = Image.open(io.BytesIO(file.data))
        found = image.getexif()
        assert found.get_ifd(0x8825)[1] == "N"
        assert found[0x0110].startswith("camera")
        assert len(found.get_ifd(0x8825)[2]) == 3
        assert image.info["icc_profile"]
        assert image.info["comment"].startswith(b"comment")
        assert all(mark in file.data for mark in file.marks)
        assert Image.open(io.BytesIO(file.data[file.data.index(b"\xff\xd8\xff", 4) :])).size == (28, 28), "the thumbnail in the EXIF"


def test_originals_keep_their_jpeg_byte_for_byte(outputs: Outputs) -> None:
    kept = [bytes(sample.image) for shard in samples(outputs.original).values() for sample in shard]
    assert kept == [file.data for number, file in enumerate(outputs.files) if number != 7]


@pytest.mark.parametrize("name", ["facemae", "released", "none"])
def test_no_byte_beside_the_pixels_is_carried_over(outputs: Outputs, name: str) -> None:
    root = getattr(outputs, name)
    marks = [mark for number, file in enumerate(outputs.files) for mark in file.marks if number != 7] + [b"holiday-", b"surname-"]
    before = objects(outputs.original)
    assert [mark for mark in marks if not any(mark in data for data in before.values())] == [], "the search finds what is there"
    marks += [*outputs.files[7].marks, str(outputs.folder / "source").encode()]
    if name == "released":
        keys = [sample.key.encode() for shard in samples(outputs.original).values() for sample in shard]
        marks += [*keys, outputs.original.encode(), SECRET.encode(), bytes.fromhex(SECRET), b"rekey-secret"]
    for key, data in objects(root).items():
        assert [mark for mark in marks if mark in data] == [], key
    for shard in Dataset(root).manifests():
        for member in read_members(Dataset(root).read(shard)):
            assert member.name.endswith((".jpg", ".cls"))
            assert not member.name.endswith(".jpg") or segments(bytes(member.data)) == [
                "d8",
                "e0",
                "db",
                "db",
                "c0",
                "c4",
                "c4",
                "c4",
                "c4",
                "da",
            ]
    assert verify(root).ok


def segments(jpeg: bytes) -> list[str]:
    """The markers of a JPEG up to its scan; a bare JFIF header, no thumbnail in it, and nothing after the end."""
    found, offset = ["d8"], 2
    while found[-1] != "da":
        assert jpeg[offset] == 0xFF
        marker, (length,) = jpeg[offset + 1], struct.unpack(">H", jpeg[offset + 2 : offset + 4])
        assert marker != 0xE0 or length == 16, "a thumbnail in the JFIF header"
        found.append(f"{marker:02x}")
        offset += 2 + length
    assert jpeg.endswith(b"\xff\xd9")
    assert jpeg.count(b"\xff\xd9") == 1
    return found


def blocks(picture: np.ndarray) -> np.ndarray:
    """The 8 x 8 blocks of a picture without their mean and contrast, (14, 14, 192)."""
    cut = picture.reshape(14, 8, 14, 8, 3).transpose(0, 2, 1, 3, 4).reshape(14, 14, 192).astype(np.float64)
    cut -= cut.mean(axis=2, keepdims=True)
    return cut / np.maximum(np.linalg.norm(cut, axis=2, keepdims=True), 1e-9)


def copied(output: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Which blocks of an output are the original's at the same place, bool (14, 14), whatever their brightness and contrast."""
    return np.abs((blocks(output) * blocks(original)).sum(axis=2)) > COPIED


def pairs(outputs: Outputs, root: str) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Each output with its original and the original's key."""
    found = []
    for before, after in zip(samples(outputs.original).values(), samples(root).values(), strict=True):
        found += [(decode(a.image), decode(b.image), b.key) for b, a in zip(before, after, strict=True)]
    return found


def test_no_block_of_an_output_is_the_original_s(outputs: Outputs) -> None:
    found = pairs(outputs, outputs.facemae)
    assert len(found) == 11
    for number, (output, original, _) in enumerate(found):
        assert not copied(output, original).any()
        stranger = found[number - 1][1]
        assert not copied(output, stranger).any(), "chance gives none either, so none is the right number to ask for"


def test_the_search_for_copied_blocks_finds_them(outputs: Outputs) -> None:
    """Without protection every block is found; with visible patches pasted back, faint and darkened, exactly those."""
    for output, original, _ in pairs(outputs, outputs.none):
        assert copied(output, original).all()
    for output, original, key in pairs(outputs, outputs.facemae):
        seen = np.zeros(49, bool)
        seen[random_mask([key], 49, 0.75, 2)[0]] = True
        where = seen.reshape(7, 7).repeat(16, 0).repeat(16, 1)
        pasted = np.where(where[..., None], original * 0.3 + 40, output).astype(np.uint8)
        np.testing.assert_array_equal(copied(decode(encode(pasted)), original), seen.reshape(7, 7).repeat(2, 0).repeat(2, 1))


def test_no_protection_says_so_in_its_lineage(outputs: Outputs) -> None:
    assert "not a protection" in Dataset(outputs.none).description()["lineage"]["config"]["protection"]["warning"]
    assert "not a protection" not in json.dumps(Dataset(outputs.facemae).description())
    assert Dataset(outputs.none).description()["lineage"]["config"]["jpeg"]["quality"] == JPEG_QUALITY
    assert all(item.source is None for m in Dataset(outputs.none).manifests() for item in read_samples(Dataset(outputs.none).read(m)))
