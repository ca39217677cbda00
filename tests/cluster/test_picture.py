"""Which pictures are kept byte for byte, which are made over, and which are refused and why."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster import picture
from cluster.picture import PictureError, align, decode, encode


def gradient(size: int = 112) -> np.ndarray:
    """uint8 (size, size, 3): smooth, and different in every direction, so that a turned or mirrored copy is far off."""
    ramp = np.linspace(0, 255, size)
    red, green = np.meshgrid(ramp, ramp)
    return np.stack([red, green * 0.5, np.where(red > green, 200, 20)], -1).astype(np.uint8)


def saved(pixels: np.ndarray | Image.Image, kind: str, mode: str | None = None, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def error_of(data: bytes, *, resize: bool = False) -> PictureError:
    with pytest.raises(PictureError) as caught:
        align(data, resize=resize)
    return caught.value


def distance(jpeg: bytes | memoryview, pixels: np.ndarray) -> float:
    """Mean absolute difference of the decoded JPEG from what it should show."""
    return float(np.abs(decode(jpeg).astype(int) - pixels).mean())


@pytest.mark.parametrize(
    "options", [{"quality": 92}, {"quality": 30, "subsampling": 2}, {"progressive": True}, {"mode": "L"}, {"comment": b"hello"}]
)
@pytest.mark.parametrize("resize", [False, True])
def test_an_aligned_jpeg_is_kept_byte_for_byte(options: dict[str, Any], resize: bool):
    data = saved(gradient(), "JPEG", **options)
    for given_data in (data, memoryview(data), memoryview(b"xx" + data)[2:]):
        aligned = align(given_data, resize=resize)
        assert aligned.kept
        assert bytes(aligned.jpeg) == data
    assert decode(data).shape == (112, 112, 3)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_other_formats_become_jpeg(kind: str):
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    aligned = align(saved(gradient(), kind, **options), resize=False)
    assert not aligned.kept
    assert aligned.jpeg == encode(gradient())
    assert distance(aligned.jpeg, gradient()) < 2


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_every_png_mode_becomes_rgb(mode: str):
    image = Image.fromarray(gradient()).convert(mode)
    aligned = align(saved(image, "PNG"), resize=False)
    assert distance(aligned.jpeg, np.asarray(image.convert("RGB"))) < (15 if mode in ("P", "1") else 2)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = gradient()[..., 0]
    data = saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
    assert distance(align(data, resize=False).jpeg, np.stack([grey] * 3, -1)) < 2


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in parts)


def test_sixteen_bit_colour_is_scaled():
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in gradient())
    assert distance(align(_png(112, 112, 16, 2, rows), resize=False).jpeg, gradient()) < 2


def test_cmyk_becomes_rgb():
    image = Image.fromarray(gradient())
    aligned = align(saved(image, "JPEG", "CMYK", quality=95), resize=False)
    assert not aligned.kept
    assert distance(aligned.jpeg, gradient()) < 3


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What must be stored so that a viewer that follows EXIF shows ``pixels``."""
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL's transpose codes
    return pixels if inverse is None else np.asarray(Image.fromarray(pixels).transpose(Image.Transpose(inverse)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "size"), [("JPEG", 112), ("PNG", 112), ("JPEG", 224), ("WEBP", 224)])
def test_exif_orientation_is_followed(kind: str, size: int, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(_turned(gradient(size), orientation), kind, exif=exif, quality=95)
    aligned = align(data, resize=True)
    assert aligned.kept == (kind == "JPEG" and size == 112 and orientation == 1)
    assert distance(aligned.jpeg, gradient()) < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_cannot_be_read_costs_no_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(gradient(), "JPEG", exif=exif)
    for damaged in (data.replace(b"MM\0*", b"MM\0\xff"), data.replace(b"MM\0*\0\0\0\x08", b"MM\0*\xff\xff\xff\xff")):
        assert damaged != data
        assert bytes(align(damaged, resize=False).jpeg) == damaged


def test_what_is_encoded_holds_no_metadata_and_is_always_the_same():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    aligned = align(saved(gradient(), "PNG", exif=exif), resize=False)
    assert b"secret" not in bytes(aligned.jpeg)
    with Image.open(io.BytesIO(aligned.jpeg)) as image:
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert image.layer[0][1:3] == (1, 1)  # 4:4:4
    assert encode(gradient()) == encode(gradient().copy()) == encode(np.asfortranarray(gradient())) == aligned.jpeg
    assert encode(gradient()[:, ::-1]) == encode(np.ascontiguousarray(gradient()[:, ::-1]))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_encode_and_decode_are_close(seed: int):
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((112, 112), Image.Resampling.BICUBIC))
    assert distance(encode(pixels), pixels) < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(224, 224), (112, 113), (100, 80), (1, 1)])
def test_another_size_names_resize_or_is_resized(kind: str, shape: tuple[int, int]):
    pixels = np.asarray(Image.fromarray(gradient()).resize(shape[::-1]))
    data = saved(pixels, kind)
    error = error_of(data)
    assert error.reason == "wrong-size"
    assert "--resize" in str(error)
    assert f"{shape[1]} x {shape[0]}" in str(error)  # width x height, as people say it
    aligned = align(data, resize=True)
    assert not aligned.kept
    assert decode(aligned.jpeg).shape == (112, 112, 3)


def test_resize_takes_the_mean_of_an_area():
    large = gradient(224)
    expected = large.reshape(112, 2, 112, 2, 3).mean((1, 3))
    assert distance(align(saved(large, "PNG"), resize=True).jpeg, expected) < 2


@pytest.mark.parametrize("resize", [False, True])
def test_a_truncated_jpeg_is_refused_wherever_it_is_cut(resize: bool):
    for pixels in (gradient(), gradient(150)) if resize else (gradient(),):
        data = saved(pixels, "JPEG", quality=95)
        for cut in [*range(3, 700, 37), *range(700, len(data) - 2, 211), len(data) - 60, len(data) - 10]:
            assert error_of(data[:cut], resize=resize).reason in ("damaged-image", "not-an-image"), cut


def test_a_truncated_png_is_refused():
    data = saved(gradient(), "PNG")
    for cut in (8, 20, 40, len(data) // 2, len(data) - 40):  # the last 20 bytes hold no pixel
        assert error_of(data[:cut]).reason == "not-an-image"


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is no picture\n" * 10,
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0" + bytes(500),
        b"GIF89a" + bytes(100),
        b"<svg/>",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b"\0",
    ],
)
def test_what_is_no_picture_says_so_in_the_same_words_each_time(data: bytes):
    first, second = error_of(data), error_of(data)
    assert first.reason == "not-an-image"
    assert str(first) == str(second)
    assert "0x" not in str(first)  # a memory address would make the ledger of equal input differ


def test_formats_outside_the_list_are_refused_even_where_pillow_reads_them():
    for kind in ("GIF", "TIFF", "PPM"):
        assert error_of(saved(gradient(), kind)).reason == "not-an-image"


def test_an_empty_file_is_called_empty():
    assert error_of(b"").reason == "empty-file"


def test_a_file_too_large_for_a_shard_is_refused(monkeypatch: pytest.MonkeyPatch):
    data = saved(gradient(), "JPEG")
    monkeypatch.setattr(picture, "MAX_MEMBER_BYTES", len(data) + 99)
    assert align(data + bytes(99), resize=False).kept
    assert error_of(data + bytes(100)).reason == "too-large"


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(saved(gradient(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    rows = bytes(1 + 20_000 // 8) * 20_000
    return {
        "png": _png(20_000, 20_000, 1, 0, rows),
        "png below Pillow's own limit": _png(12_000, 10_000, 1, 0, bytes(1 + 12_000 // 8) * 10_000),
        "jpeg": _jpeg_claiming(20_000, 20_000),
        "jpeg of the largest size": _jpeg_claiming(65_500, 65_500),
        "long": _jpeg_claiming(65_500, 300),
        "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 20_000, 20_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(46),
    }


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_and_takes_no_memory(resize: bool):
    for name, data in bombs().items():
        tracemalloc.start()
        before = _resident()
        error = error_of(data, resize=resize)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert error.reason == "too-large", (name, str(error))
        assert peak < 1 << 20, name
        assert _resident() - before < 16 << 20, name  # memory of the codecs, which tracemalloc does not see


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_decode_refuses_what_is_no_aligned_jpeg():
    for data, reason in [
        (saved(gradient(), "PNG"), "not-an-image"),
        (saved(gradient(113), "JPEG"), "wrong-size"),
        (saved(gradient(), "JPEG")[:-300], "damaged-image"),
        (_jpeg_claiming(65_500, 65_500), "wrong-size"),
        (b"", "not-an-image"),
    ]:
        with pytest.raises(PictureError) as caught:
            decode(data)
        assert caught.value.reason == reason


@given(st.integers(0, 10**6), st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_damaged_files_raise_nothing_but_picture_error(seed: int, kind: str, resize: bool):
    rng = np.random.default_rng(seed)
    data = bytearray(saved(gradient(16 if seed % 2 else 112), kind))
    for place in rng.integers(0, min(len(data), 700 if seed % 3 else len(data)), rng.integers(1, 8)):
        data[place] = rng.integers(0, 256)
    with contextlib.suppress(PictureError):
        aligned = align(bytes(data), resize=resize)
        try:
            assert decode(aligned.jpeg).shape == (112, 112, 3)
        except PictureError as error:
            raise AssertionError("what ingest accepts, every later stage can read") from error


def test_what_is_kept_decodes_as_it_looks_to_other_readers():
    for options in ({"quality": 92}, {"quality": 60, "subsampling": 2}, {"mode": "L"}, {"progressive": True}):
        data = saved(gradient(), "JPEG", **options)
        with Image.open(io.BytesIO(data)) as image:
            assert distance(data, np.asarray(image.convert("RGB"))) < 3
