"""Well-formed input of every shape (hypothesis): the pieces of the hostile corpus in any order, and pictures of every kind."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cluster.picture import align, decode
from cluster.shard import Rejected, Sample
from cluster.source import TarSource, TarUnit
from tests.fuzz.corpus import gradient, saved, turned
from tests.hostile_tars import CASES, Expected, between, face, good
from tests.tars import END

FIRST, LAST = face(b"first", 1), face(b"last", 2) + END
PIECES = {
    name: (data[len(FIRST) : -len(LAST)], expected[1:-1])
    for name, (data, expected) in CASES.items()
    if data.startswith(FIRST) and data.endswith(LAST) and expected[-1:] == [good(2)] and len(data) < 1 << 20
}
"""What stands between two good samples where it does not end the tar."""


def read(data: bytes) -> Expected:
    items = TarSource("/nowhere", "x.tar").samples(TarUnit("00000", 0, "x.tar", len(data)), data)
    return [(bytes(item.image), item.identity) if isinstance(item, Sample) else item.reason for item in items]


def test_there_are_pieces_of_every_group():
    assert len(PIECES) > 50
    assert {name.split(":")[0] for name in PIECES} >= {"not_files", "sizes", "names", "labels"}
    assert {item for _, items in PIECES.values() for item in items if isinstance(item, str)} >= {"not-a-file", "no-label", "bad-label"}


@given(st.lists(st.sampled_from(sorted(PIECES)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_each_piece_costs_what_it_costs_alone_whatever_stands_around_it(names: list[str]):
    data, expected = b"", list[tuple[bytes, int] | str]()
    for name in names:
        piece, costs = PIECES[name]
        data += FIRST + piece
        expected += [good(1), *({"empty-file": (b"", 3)}.get(cost, cost) if isinstance(cost, str) else cost for cost in costs)]
    assert read(data + LAST) == [*expected, good(2)]  # the picture of no bytes is refused later, by align


@given(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=5), st.integers(0, 1 << 30))
@settings(max_examples=150, deadline=None)
def test_a_cut_costs_what_lies_behind_it(names: list[str], place: int):
    data = b"".join(FIRST + PIECES[name][0] for name in names) + LAST
    whole, cut = read(data), read(data[: place % (len(data) - len(END))])
    assert cut[-1] in ("truncated-tar", "not-a-tar")
    before = cut[:-1]
    assert [item for item in before if not isinstance(item, str)] == [item for item in whole if not isinstance(item, str)][
        : sum(not isinstance(item, str) for item in before)
    ]


@pytest.mark.parametrize(
    ("kind", "modes"), [("JPEG", "L RGB CMYK"), ("PNG", "1 L LA P RGB RGBA I;16"), ("WEBP", "RGB RGBA"), ("BMP", "1 L P RGB")]
)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_valid_picture_of_any_shape_is_what_pillow_shows(kind: str, modes: str, data: st.DataObject):
    width, height = (data.draw(st.sampled_from([1, 7, 111, 112, 113, 300])) for _ in range(2))
    mode, turn = data.draw(st.sampled_from(modes.split())), data.draw(st.integers(1, 8))
    image = gradient(width, height).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    options: dict[str, Any] = {"exif": turned(turn)} if kind != "BMP" else {}
    if kind == "JPEG":
        options |= {
            "progressive": data.draw(st.booleans()),
            "quality": 95,
            "subsampling": data.draw(st.integers(0, 2)) if mode == "RGB" else 0,
        }
    file = saved(image, kind, **options)
    with Image.open(io.BytesIO(file)) as opened:
        shown = ImageOps.exif_transpose(opened)
        if mode == "I;16":
            shown = Image.fromarray((np.asarray(shown) >> 8).astype(np.uint8))
        expected = np.asarray(shown.convert("RGB").resize((112, 112), Image.Resampling.BOX)).astype(int)
    found = decode(align(file, resize=True).jpeg)
    assert np.abs(found - expected).mean() < 12  # re-encoded at quality 92; dithered bits are all edges


def test_rejected_rows_of_a_tar_never_hold_a_picture():
    items = TarSource("/nowhere", "x.tar").samples(TarUnit("00000", 0, "x.tar", 0), between())
    assert not any(isinstance(item, Rejected) for item in items)
