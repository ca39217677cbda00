"""Pictures in and out of bytes: JPEG by simplejpeg (libjpeg-turbo), anything else by Pillow, with limits for hostile files."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cluster.shard import MAX_MEMBER_BYTES

SIZE = 112
"""Side of an aligned face in pixels (ArcFace template)."""
MAX_PIXELS = 4096 * 4096
JPEG_QUALITY = 92
"""With 4:4:4 colour: fixed, so that the same picture always gives the same bytes; recorded in the lineage."""


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
        _require_pixels(width, height)
        if (height, width) == (SIZE, SIZE) and colorspace in ("YCbCr", "Gray", "RGB") and not _is_turned(data):
            decode(data)  # a damaged picture is refused here, not a thousand GPUs later
            return Aligned(data, kept=True)
    picture = _open(data)
    if picture.shape[:2] != (SIZE, SIZE):
        if not resize:
            _require_size(*picture.shape[:2])
        picture = np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BOX))
    return Aligned(encode(picture), kept=False)


def _jpeg_header(data: bytes | memoryview) -> tuple[int, int, str]:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise PictureError("not-an-image", f"no JPEG header: {error}") from None
    return height, width, colorspace


def _is_turned(data: bytes | memoryview) -> bool:
    """Whether EXIF asks for a rotation, which ``decode`` would not do. EXIF that cannot be read asks for none."""
    if b"Exif\0\0" not in bytes(data):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # as in _open; the pixels are judged elsewhere
        return False


def _open(data: bytes | memoryview) -> np.ndarray:
    """Any picture Pillow reads as uint8 (H, W, 3) RGB, turned upright by its EXIF orientation."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
            _require_pixels(*image.size)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))
    except PictureError:
        raise
    except UnidentifiedImageError:  # its text names a memory address, and equal input gives an equal ledger
        raise PictureError("not-an-image", "no JPEG, PNG, WebP or BMP picture") from None
    except Image.DecompressionBombError as error:
        raise PictureError("too-large", str(error)) from None
    except Exception as error:  # Pillow raises whatever its codecs raise; each is one bad picture, never the run
        raise PictureError("not-an-image", f"no JPEG, PNG, WebP or BMP picture: {type(error).__name__}: {error}"[:300]) from None


def _require_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PictureError("too-large", f"{width} x {height} pixels, the limit is {MAX_PIXELS}: crop and align faces to {SIZE} x {SIZE}")


def _require_size(height: int, width: int) -> None:
    if (height, width) != (SIZE, SIZE):
        message = f"{width} x {height} pixels, not {SIZE} x {SIZE}: align the faces first, or run ingest with --resize"
        raise PictureError("wrong-size", message)
