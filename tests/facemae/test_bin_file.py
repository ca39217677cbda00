"""Verification files: what InsightFace writes is read, and nothing in a pickle is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae import bin_file
from facemae.bin_file import BinFileError, read_bin

IMAGES = [b"\xff\xd8\xff image %d" % i * (i + 1) for i in range(6)]
SAME = [True, False, True]


def refused(data: bytes) -> str:
    with pytest.raises(BinFileError) as caught:
        read_bin(data)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("kind", [tuple, list])
def test_what_python_3_writes_is_read(protocol: int, kind: type):
    pairs = read_bin(pickle.dumps(kind((IMAGES, SAME)), protocol))
    assert pairs.images == IMAGES
    assert pairs.same.tolist() == SAME
    assert pairs.same.dtype == bool


@given(st.lists(st.binary(max_size=300), max_size=20, unique=True), st.integers(3, 5))
@settings(max_examples=50, deadline=None)
def test_any_images_come_back(images: list[bytes], protocol: int):
    images = images[: len(images) // 2 * 2]
    same = [bool(i % 3) for i in range(len(images) // 2)]
    pairs = read_bin(pickle.dumps((images, same), protocol))
    assert (list(pairs.images), pairs.same.tolist()) == (images, same)


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """What cPickle of Python 2 writes at protocol 2: str by SHORT_BINSTRING and BINSTRING, each with its memo slot."""
    slot = iter(range(1000))
    parts = [b"\x80\x02]q", bytes([next(slot)]), b"("]
    for image in images:
        size = b"U" + bytes([len(image)]) if len(image) < 256 else b"T" + struct.pack("<I", len(image))
        parts += [size, image, b"q", bytes([next(slot)])]
    parts += [b"e]q", bytes([next(slot)]), b"(", *(b"\x88" if value else b"\x89" for value in same), b"e\x86q", bytes([next(slot)]), b"."]
    return b"".join(parts)


def test_what_python_2_writes_is_read():
    images = [*IMAGES[:4], bytes(range(256)) * 3, b""]
    data = python2(images, SAME)
    assert pickle.loads(data, encoding="bytes") == (images, SAME)  # the file is what it should be
    pairs = read_bin(data)
    assert (list(pairs.images), pairs.same.tolist()) == (images, SAME)


class _Reduced:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._value = (function, arguments)

    def __reduce__(self) -> Any:
        return self._value


def calls(marker: Path) -> dict[str, Any]:
    shell = _Reduced(os.system, f"touch {marker}")
    return {
        "os.system": shell,
        "builtins.eval": _Reduced(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": _Reduced(exec, f"open({str(marker)!r}, 'w')"),
        "nested": ([_Reduced(list, (shell,))], [True]),
        "among images": ([*IMAGES, shell, b""], [*SAME, True]),
        "as a boolean": (IMAGES, [True, False, shell]),
        "getattr": _Reduced(getattr, "x", "upper"),
        "numpy array": ([np.arange(3, dtype=np.uint8)] * 2, [True]),
        "numpy bool": ([b"", b""], [np.True_]),
        "class": (IMAGES, dict),
        "set": {1, 2},
        "dict": {"a": 1},
        "text": "hello",
        "huge number": 10**4000,
    }


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_calls_anything_is_refused_and_calls_nothing(tmp_path: Path, protocol: int):
    marker = tmp_path / "executed"
    for name, content in calls(marker).items():
        message = refused(pickle.dumps(content, protocol))
        assert "not read: at byte" in message, name
        assert not marker.exists(), name
    pickle.loads(pickle.dumps(calls(marker)["os.system"]))
    assert marker.exists(), "the attack does work where pickles are trusted"


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"(cos\nsystem\nS'true'\no.",
        b"\x80\x02\x82\x01.",
        b"Pos.system\n.",
        b"\x80\x02)\x81.",
        b"\x80\x02]}b.",
        b"\x80\x05\x97.",
    ],
)
def test_every_way_to_name_an_object_is_refused(program: bytes):
    assert "not read: at byte" in refused(program)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
        b"\x80\x04\x8e" + struct.pack("<Q", (1 << 63) - 1) + b"x.",
        b"\x80\x04B" + struct.pack("<I", 0xFFFFFFFF) + b"x.",
        b"\x80\x02T" + struct.pack("<i", -5) + b"x.",
        b"\x80\x02T" + struct.pack("<I", 0x7FFFFFFF) + b"x.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"].",
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x02]r\xff\xff\xff\xff.",
        b"]p4000000000\n.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"\x80\x04" + b"]" * 100_000 + b"\x85" * 99_999 + b".",
    ],
)
def test_a_claim_costs_no_memory(program: bytes):
    tracemalloc.start()
    refused(program)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_an_image_given_many_times_over_is_refused():
    image = bytes(1 << 20)
    data = pickle.dumps(([image] * 20_000, [True] * 10_000), 4)
    assert len(data) < 2 << 20
    assert "many times over" in refused(data)


def test_more_steps_than_a_file_needs_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bin_file, "_MAX_STEPS", 1000)
    assert "more memory" in refused(b"\x80\x04" + b"]" * 2000 + b".")
    monkeypatch.setattr(bin_file, "MAX_BIN_BYTES", 10)
    assert "the limit is 10" in refused(bytes(11))


@pytest.mark.parametrize(
    "content",
    [
        (),
        (IMAGES,),
        (IMAGES, SAME, SAME),
        (IMAGES, SAME[:2]),
        (IMAGES[:5], SAME),
        (tuple(IMAGES), SAME),
        ([*IMAGES[:5], 5], SAME),
        ([*IMAGES[:5], [b""]], SAME),
        (IMAGES, [True, False, 2]),
        (IMAGES, [True, False, b"1"]),
        [IMAGES, True],
        5,
    ],
)
def test_other_content_is_named(content: Any):
    assert refused(pickle.dumps(content, 4))


@pytest.mark.parametrize("data", [b"", b".", b"N.", b"\x80", b"hello", b"\xff\xd8\xff\xe0", bytes(100), b"\x80\x63].", b"]0."])
def test_what_is_no_pickle_is_named(data: bytes):
    assert refused(data)


def test_a_file_cut_anywhere_or_with_bits_flipped_raises_nothing_else():
    rng = random.Random(0)
    for good in (pickle.dumps((IMAGES, SAME), 4), python2(IMAGES, SAME)):
        for cut in range(len(good)):
            refused(good[:cut])
        for _ in range(3000):
            data = bytearray(good)
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                pairs = read_bin(bytes(data))
            except BinFileError:
                continue
            assert all(isinstance(image, bytes) for image in pairs.images)


def test_the_unpickler_itself_knows_no_global():
    """The second lock, should the first ever miss an instruction."""
    for protocol in range(6):
        with pytest.raises(BinFileError, match="class or a function"):
            bin_file._Unpickler(io.BytesIO(pickle.dumps(os.system, protocol))).load()
    with pytest.raises(BinFileError, match="outside object"):
        bin_file._Unpickler(io.BytesIO(b"Pos.system\n.")).load()
