"""Pair lists of every form give one structure, and what cannot be read is named by file and line."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facemae.bin_file import read_bin
from facemae.pairs import PairList, PairListError, of_bin, read_cfp, read_csv, read_lfw, read_pairs
from facemae.table import TableError

LFW = "2\t2\nAnna\t1\t4\nBen\t2\t3\nAnna\t1\tBen\t2\nCleo\t11\tBen\t3\nDana\t1\t2\nAnna\t1\t2\nDana\t1\tAnna\t1\nBen\t2\tDana\t2\n"
ROWS = [("a/1", "a/2"), ("b/1", "b/2"), ("a/1", "b/1"), ("a/2", "b/2")]


def named(pairs: PairList) -> list[tuple[str, str]]:
    return [(pairs.images[a], pairs.images[b]) for a, b in zip(pairs.left, pairs.right, strict=True)]


def test_lfws_list() -> None:
    pairs = read_pairs(LFW, "pairs.txt")
    assert named(pairs)[:4] == [
        ("Anna/Anna_0001.jpg", "Anna/Anna_0004.jpg"),
        ("Ben/Ben_0002.jpg", "Ben/Ben_0003.jpg"),
        ("Anna/Anna_0001.jpg", "Ben/Ben_0002.jpg"),
        ("Cleo/Cleo_0011.jpg", "Ben/Ben_0003.jpg"),
    ]
    assert pairs.same.tolist() == [True, True, False, False] * 2
    assert pairs.fold is not None
    assert pairs.fold.tolist() == [0] * 4 + [1] * 4
    assert len(pairs.images) == len(set(pairs.images)) == 8


def test_lfws_list_in_a_folder_of_short_names() -> None:
    short = {"Anna/0001.jpg", "Anna/0004.jpg", "Ben/0002.jpg"}
    assert named(read_lfw(LFW, "pairs.txt", short))[0] == ("Anna/0001.jpg", "Anna/0004.jpg")
    assert named(read_lfw(LFW, "pairs.txt", {"Anna/Anna_0001.jpg"}))[0] == ("Anna/Anna_0001.jpg", "Anna/Anna_0004.jpg")


def test_lfws_view_1_has_no_folds() -> None:
    pairs = read_lfw("1\nAnna 1 2\nAnna 1 Ben 1\n", "pairsDevTest.txt")
    assert (pairs.fold, pairs.same.tolist()) == (None, [True, False])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_with_and_without_folds(end: str) -> None:
    text = "\ufeff" + end.join(["image_a, image_b,same,fold,note", "a/1.jpg,a/2.jpg,1,3,x", "a/1.jpg,b/1.jpg,False,4,", ""])
    pairs = read_pairs(text, "list.csv")
    assert named(pairs) == [("a/1.jpg", "a/2.jpg"), ("a/1.jpg", "b/1.jpg")]
    assert pairs.fold is not None
    assert (pairs.same.tolist(), pairs.fold.tolist()) == ([True, False], [3, 4])
    assert read_csv("same,image_b,image_a\n1,x,y\n", "list.csv").fold is None


def test_a_csv_of_identities_and_files() -> None:
    pairs = read_pairs("fold,same,identity_a,file_a,identity_b,file_b\n1,1,07256,011760.jpg,07256,089654.jpg\n", "list.csv")
    assert named(pairs) == [("07256/011760.jpg", "07256/089654.jpg")]


def write_cfp(root: Path, people: int = 3) -> Path:
    """CFP's tree as it is handed out, small: two frontal and one profile image a person."""
    frontal = [f"../Data/Images/{p:03d}/frontal/{i:02d}.jpg" for p in range(1, people + 1) for i in (1, 2)]
    profile = [f"../Data/Images/{p:03d}/profile/01.jpg" for p in range(1, people + 1)]
    files = {
        f"Pair_list_{kind}.txt": [f"{i} {path}" for i, path in enumerate(names, 1)] for kind, names in (("F", frontal), ("P", profile))
    }
    for split in range(1, 11):
        p = split % people + 1
        other = p % people + 1
        files |= {
            f"Split/FP/{split:02d}/same.txt": [f"{2 * p - 1},{p}", f"{2 * p},{p}"],
            f"Split/FP/{split:02d}/diff.txt": [f"{2 * p - 1},{other}"],
        }
        files |= {f"Split/FF/{split:02d}/same.txt": [f"{2 * p - 1},{2 * p}"], f"Split/FF/{split:02d}/diff.txt": [f"{2 * p},{2 * other}"]}
    for name, lines in files.items():
        path = root / "Protocol" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\r\n".join(lines) + "\r\n")
    return root


def test_cfps_lists(tmp_path: Path) -> None:
    root = write_cfp(tmp_path)
    profile, frontal = (read_cfp(lambda path: (root / path).read_text(), protocol) for protocol in ("FP", "FF"))
    assert profile.fold is not None
    assert profile.fold.tolist() == np.repeat(np.arange(10), 3).tolist()
    assert profile.same.tolist() == [True, True, False] * 10
    assert named(profile)[:3] == [
        ("Data/Images/002/frontal/01.jpg", "Data/Images/002/profile/01.jpg"),
        ("Data/Images/002/frontal/02.jpg", "Data/Images/002/profile/01.jpg"),
        ("Data/Images/002/frontal/01.jpg", "Data/Images/003/profile/01.jpg"),
    ]
    assert named(frontal)[:2] == [
        ("Data/Images/002/frontal/01.jpg", "Data/Images/002/frontal/02.jpg"),
        ("Data/Images/002/frontal/02.jpg", "Data/Images/003/frontal/02.jpg"),
    ]
    (root / "Protocol/Split/FP/04/same.txt").write_text("1,99\n")
    with pytest.raises(PairListError, match=r"Split/FP/04/same.txt names image 99"):
        read_cfp(lambda path: (root / path).read_text())
    (root / "Protocol/Split/FP/04/same.txt").write_text("1;2\n")
    with pytest.raises(PairListError, match="two numbers"):
        read_cfp(lambda path: (root / path).read_text())
    (root / "Protocol/Pair_list_P.txt").write_text("1 /etc/passwd\n")
    with pytest.raises(PairListError, match="Pair_list_P"):
        read_cfp(lambda path: (root / path).read_text())
    with pytest.raises(PairListError, match="no protocol 'PP'"):
        read_cfp(lambda path: "", "PP")


def test_a_bin_files_images_count_once() -> None:
    images = [b"one", b"two", b"three", b"one"]
    pairs = of_bin(read_bin(pickle.dumps((images, [True, False]), 4)), "x.bin")
    assert len(pairs.images) == 3
    assert (pairs.left.tolist(), pairs.right.tolist(), pairs.same.tolist(), pairs.fold) == ([0, 2], [1, 0], [True, False], None)


@given(st.lists(st.tuples(st.sampled_from(ROWS), st.booleans(), st.integers(0, 9)), min_size=1, max_size=20))
def test_a_csv_that_was_written_comes_back(rows: Sequence[tuple[tuple[str, str], bool, int]]) -> None:
    text = "image_a,image_b,same,fold\n" + "".join(f"{a},{b},{int(same)},{fold}\n" for (a, b), same, fold in rows)
    pairs = read_pairs(text, "list.csv")
    assert pairs.fold is not None
    assert list(zip(named(pairs), pairs.same.tolist(), pairs.fold.tolist(), strict=True)) == list(rows)
    keep = pairs.usable(np.array([name.startswith("a") for name in pairs.images]))
    assert named(pairs.chosen(keep)) == [names for names, _, _ in rows if names == ("a/1", "a/2")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must be"),
        ("hello\n", "the first line must be LFW's"),
        ("0\t0\n", "holds no pair"),
        ("1 1\nAnna 1 2\n", "need 2 lines, found 1"),
        ("1 1\nAnna 1 2\nAnna 1 2\n", "pair 2 must be 'name i other j'"),
        ("1 1\nAnna 1 x\nAnna 1 Ben 2\n", "pair 1 must be 'name i j'"),
        ("1 1\n../x 1 2\nAnna 1 Ben 2\n", "without '..'"),
        ("image_a,image_b\n", "needs the columns"),
        ("image_a,image_b,same\n", "holds no row"),
        ("image_a,image_b,same\na,b,perhaps\n", "line 2: the column 'same' must be 1 or 0, found 'perhaps'"),
        ("image_a,image_b,same\na,b\n", "line 2: image_a, image_b, same must not be empty"),
        ("image_a,image_b,same\na,/etc/passwd,1\n", "without '..'"),
        ("image_a,image_b,same,fold\na,b,1,2\na,b,1,\n", "1 of 2 pairs have a fold"),
        ("image_a,image_b,same,fold\na,b,1,-2\n", "whole number"),
        ('image_a,image_b,same\n"' + "x" * 200_000 + '",b,1\n', "no CSV"),
    ],
)
def test_a_list_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises((PairListError, TableError)) as caught:
        read_pairs(text, "the list")
    assert message in str(caught.value)
    assert "the list" in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_a_list_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(PairListError, TableError):
        assert len(read_pairs(text, "x")) > 0
