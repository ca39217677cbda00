"""InsightFace's verification files (``lfw.bin``, ``cfp_fp.bin``, ...): pairs of faces in a pickle, read without trusting it.

A pickle is a program. Here it is read as text first: only the few instructions that build lists of bytes and booleans may occur, their
number is bounded, and no number of a memo slot may be above what the file can fill (Python's unpickler would allocate as many). What is
left goes through an unpickler that knows no class and no function at all. Files written by Python 2 (protocol 2, ``str``) are read as well.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

MAX_BIN_BYTES = 2 << 30
MAX_IMAGES = 500_000
MAX_IMAGE_BYTES = 64 << 20
_MAX_STEPS = 5 * MAX_IMAGES
"""An image and its memo slot, half a boolean, and what frames and lists add."""
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}
_ALLOWED = _MEMO | {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"),
    *("NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2"),
}


class BinFileError(ValueError):
    """Bytes that are no verification file, or one that asks for more than data."""


@dataclass(frozen=True)
class Pairs:
    """Face pairs: ``images[2 * i]`` and ``images[2 * i + 1]``, encoded, are of one person where ``same[i]``, bool (N,)."""

    images: Sequence[bytes]
    same: np.ndarray


def read_bin(data: bytes) -> Pairs:
    """The pairs of a ``.bin`` file.

    Raises:
        BinFileError: too large, no pickle, one that names a class or a function, or not a list of images and a list of booleans.
    """
    if len(data) > MAX_BIN_BYTES:
        raise BinFileError(f"{len(data)} bytes, the limit is {MAX_BIN_BYTES}: no verification set has as many")
    _require_plain(data)
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except BinFileError:
        raise
    except Exception as error:  # an unpickler raises whatever a damaged program leads it to
        raise BinFileError(f"no verification file: its pickle is damaged ({type(error).__name__})") from None
    return _pairs(content, len(data))


class _Unpickler(pickle.Unpickler):
    """Knows no global. _require_plain has refused them already; this holds should it ever miss one."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise BinFileError("the pickle names a class or a function")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise BinFileError("the pickle names an outside object")


def _require_plain(data: bytes) -> None:
    """Raises BinFileError at the first instruction that builds anything but lists, tuples, bytes and booleans. Nothing is executed."""
    try:
        for step, (opcode, argument, place) in enumerate(pickletools.genops(io.BytesIO(data)), 1):
            if opcode.name not in _ALLOWED:
                raise BinFileError(
                    f"not read: at byte {place} the pickle has {opcode.name}, and a verification file holds only lists of bytes and of "
                    "booleans. If it is from a source you trust, write it again as pickle.dump((list of bytes, list of bool), file, 4)"
                )
            if step > _MAX_STEPS or (opcode.name in _MEMO and int(argument or 0) > step):
                raise BinFileError(f"not read: at byte {place} the pickle asks for more memory than a verification file needs")
    except BinFileError:
        raise
    except Exception as error:  # genops raises ValueError, and what its readers raise for arguments that lie
        raise BinFileError(f"no verification file: not a whole pickle ({str(error)[:100]})") from None


def _pairs(content: Any, size: int) -> Pairs:
    """Checks the shape of what came out."""
    if not isinstance(content, tuple | list) or len(content) != 2 or not all(isinstance(part, list) for part in content):
        raise BinFileError("no verification file: it must hold two lists, images and booleans")
    images, same = content
    if len(images) != 2 * len(same) or len(images) > MAX_IMAGES:
        raise BinFileError(f"{len(images)} images and {len(same)} booleans: two images a boolean belong here, and at most {MAX_IMAGES}")
    if not all(isinstance(image, bytes) and len(image) <= MAX_IMAGE_BYTES for image in images):
        raise BinFileError(f"an entry is no image: each must be bytes, at most {MAX_IMAGE_BYTES}")
    if sum(map(len, images)) > size:
        raise BinFileError("the same image is given many times over, to take more memory than the file has bytes")
    if not all(isinstance(value, int) and value in (0, 1) for value in same):
        raise BinFileError("an entry of the second list is neither True nor False")
    return Pairs(images, np.array(same, bool))
