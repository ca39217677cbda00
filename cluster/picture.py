"""Pictures in and out of bytes: JPEG by simplejpeg (libjpeg-turbo), anything else by Pillow, with limits for hostile files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from cluster.picture_header import jpeg_orientation, png_problem, webp_size
from cluster.tar import MAX_MEMBER_BYTES

SIZE = 112
"""Side of an aligned face in pixels (ArcFace template)."""
MAX_PIXELS = 4096 * 4096
MAX_DECODE_BYTES = 512 << 20
"""Memory that one picture may take (measured: 450 MiB for a WebP of MAX_PIXELS; tests/cluster/test_picture.py holds it)."""
MAX_SCANS = 100
"""Scans of a progressive JPEG; encoders write about ten."""
JPEG_QUALITY = 92
"""With 4:4:4 colour: fixed, so that the same picture always gives the same bytes; recorded in the lineage."""
_REMEDY = f"crop and align faces to {SIZE} x {SIZE}"
_PLAIN = ("YCbCr", "Gray", "RGB")
_TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, -1),
    7: lambda picture: picture[::-1, ::-1].swapaxes(0, 1),
    8: lambda picture: np.rot90(picture),
}
"""How a picture of each EXIF orientation is made upright."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our own limit is lower, and speaks in the ledger


class PictureError(ValueError):
    """A file that gives no usable face picture. ``reason`` is a short word for the quarantine ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Aligned:
    """An ingested picture: its JPEG bytes and whether they are the source's own."""

    jpeg: bytes | memoryview
    kept: bool


def decode(jpeg: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """An aligned JPEG as uint8 (112, 112, 3) RGB.

    Args:
        out: where the pixels go, uint8 (112, 112, 3) and contiguous; without it a new array.

    Raises:
        PictureError: no JPEG, damaged, or of another size.
    """
    _require_size(*_jpeg_header(jpeg)[:2])
    try:
        return simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)
    except ValueError as error:
        raise PictureError("damaged-image", f"the JPEG does not decode: {error}") from None


def encode(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) RGB as a JPEG without any metadata. The same pixels always give the same bytes."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")


def align(data: bytes | memoryview, *, resize: bool) -> Aligned:
    """Make a source file a 112 x 112 JPEG. A JPEG that already is one, and upright, is kept byte for byte.

    Of an animation the first picture counts, and transparency is dropped. A picture takes up to ``MAX_DECODE_BYTES`` while it is made
    over; without ``resize`` nothing of another size is decoded.

    Args:
        resize: scale pictures of another size (area filter, whole picture) instead of refusing them.

    Raises:
        PictureError: no picture, damaged, too many pixels or bytes, or of another size without ``resize``.
    """
    if len(data) == 0:
        raise PictureError("empty-file", "the file has no bytes")
    if len(data) > MAX_MEMBER_BYTES:
        raise PictureError("too-large", f"{len(data)} bytes, the limit is {MAX_MEMBER_BYTES}: no face picture needs as many")
    if bytes(data[:3]) == b"\xff\xd8\xff":
        height, width, colorspace = _jpeg_header(data)
        _require_claim(width, height, resize=resize)
        turn = jpeg_orientation(data) if b"Exif\0\0" in bytes(data) else 1
        if (height, width) == (SIZE, SIZE) and colorspace in _PLAIN and turn == 1:
            decode(data)  # a damaged picture is refused here, not a thousand GPUs later
            return Aligned(data, kept=True)
        picture = _TURNED[turn](_decode_jpeg(data, colorspace))
    else:
        picture = _open(data, resize=resize)
    if picture.shape[:2] != (SIZE, SIZE):
        picture = np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BOX))
    return Aligned(encode(picture), kept=False)


def _jpeg_header(data: bytes | memoryview) -> tuple[int, int, str]:
    """Height, width and colour space of a JPEG that is worth decoding."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise PictureError("not-an-image", f"no JPEG that libjpeg-turbo reads: {error}") from None
    if bytes(data).count(b"\xff\xda") > MAX_SCANS:  # each passes over the whole picture, and takes a few bytes of the file
        raise PictureError("too-large", f"a JPEG of more than {MAX_SCANS} scans: save it again")
    return height, width, colorspace


def _decode_jpeg(data: bytes | memoryview, colorspace: str) -> np.ndarray:
    """A JPEG of any size and colour space as uint8 (H, W, 3) RGB. Strict, unlike Pillow, which paints grey what is missing."""
    try:
        picture = simplejpeg.decode_jpeg(data, "RGB" if colorspace in _PLAIN else "CMYK")
    except ValueError as error:
        raise PictureError("damaged-image", f"the JPEG does not decode: {error}") from None
    if picture.shape[2] == 3:
        return picture
    rgb = np.empty((*picture.shape[:2], 3), np.uint8)
    for channel in range(3):  # CMYK inverted, as Adobe and all others write it; one at a time: products take two bytes
        rgb[..., channel] = (picture[..., channel].astype(np.uint16) * picture[..., 3] + 127) // 255
    return rgb


def _open(data: bytes | memoryview, *, resize: bool) -> np.ndarray:
    """A PNG, WebP or BMP as uint8 (H, W, 3) RGB, turned upright by its EXIF orientation."""
    problem = png_problem(data) if bytes(data[:8]) == b"\x89PNG\r\n\x1a\n" else None
    if problem:
        raise PictureError("too-large", problem)
    if bytes(data[:4]) == b"RIFF":
        _require_pixels(*webp_size(data))
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "BMP")) as image:
            _require_claim(*image.size, resize=resize)
            if image.info.get("compression") in (1, 2):  # BMP's: one byte of it may stand for gigabytes, and Python decodes it
                raise PictureError("not-an-image", "a run-length encoded BMP is not read: save it as PNG")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
            return np.asarray(image.convert("RGB"))
    except PictureError:
        raise
    except UnidentifiedImageError:  # its text names a memory address, and equal input gives an equal ledger
        raise PictureError("not-an-image", "no JPEG, PNG, WebP or BMP picture") from None
    except Image.DecompressionBombError:
        raise PictureError("too-large", f"far more pixels than the limit of {MAX_PIXELS}: {_REMEDY}") from None
    except Exception as error:  # Pillow raises whatever its codecs raise; each is one bad picture, never the run
        raise PictureError("not-an-image", f"no JPEG, PNG, WebP or BMP picture: {type(error).__name__}: {error}"[:300]) from None


def _require_claim(width: int, height: int, *, resize: bool) -> None:
    _require_pixels(width, height)
    if not resize:
        _require_size(height, width)


def _require_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureError("too-large", f"{width} x {height} pixels, the limit is {MAX_PIXELS}: {_REMEDY}")


def _require_size(height: int, width: int) -> None:
    if (height, width) != (SIZE, SIZE):
        message = f"{width} x {height} pixels, not {SIZE} x {SIZE}: align the faces first, or run ingest with --resize"
        raise PictureError("wrong-size", message)
