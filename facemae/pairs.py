"""Lists of face pairs as the field hands them out, in one structure: LFW's pairs.txt, CSV, CFP's protocol folder, ``.bin`` files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from facemae import bin_file
from facemae.table import header, read_table

CFP_SPLITS = 10
_CFP_LISTS = {"FP": ("F", "P"), "FF": ("F", "F")}
_SIDES = (("image_a", "image_b"), ("identity_a", "file_a", "identity_b", "file_b"))
"""Columns of a CSV that name the two images of a pair."""
_TRUTH = {"1": True, "true": True, "same": True, "0": False, "false": False, "different": False, "diff": False}
Row = tuple[str, str, bool, int | None]
"""Names of two images, whether they show one person, and the fold."""


class PairListError(ValueError):
    """A list of pairs that cannot be read; the message names the list, the line and the remedy."""


@dataclass(frozen=True)
class PairList:
    """Pairs of images, each of one person or of two.

    Attributes:
        images: the distinct images, by path below a root or by another key, in order of first use.
        left, right: int64 (N,), the two images of each pair.
        same: bool (N,).
        fold: int64 (N,), the list's own folds; None where it has none.
    """

    images: Sequence[str]
    left: np.ndarray
    right: np.ndarray
    same: np.ndarray
    fold: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.same)

    @classmethod
    def of(cls, rows: Iterable[Row], where: str) -> PairList:
        """From rows in order.

        Raises:
            PairListError: there is none, an image's name leads out of the root, or some rows have a fold and some have none.
        """
        number, left, right, same, folds = dict[str, int](), list[int](), list[int](), list[bool](), list[int | None]()
        for a, b, value, fold in rows:
            left.append(number.setdefault(require_inside(a, where), len(number)))
            right.append(number.setdefault(require_inside(b, where), len(number)))
            same.append(value)
            folds.append(fold)
        if not same:
            raise PairListError(f"{where} holds no pair")
        known = [fold for fold in folds if fold is not None]
        if len(known) not in (0, len(folds)):
            raise PairListError(f"{where}: {len(known)} of {len(folds)} pairs have a fold: give it for all or for none")
        own = np.array(known, np.int64) if known else None
        return cls(list(number), np.array(left, np.int64), np.array(right, np.int64), np.array(same, bool), own)

    def chosen(self, pairs: np.ndarray) -> PairList:
        """Some of the pairs, bool (N,), over the same images."""
        fold = None if self.fold is None else self.fold[pairs]
        return replace(self, left=self.left[pairs], right=self.right[pairs], same=self.same[pairs], fold=fold)

    def usable(self, present: np.ndarray) -> np.ndarray:
        """The pairs both of whose images are ``present``, bool (I,): bool (N,)."""
        return present[self.left] & present[self.right]


def read_pairs(text: str, where: str, held: Container[str] = ()) -> PairList:
    """A pairs file: a CSV where its first line has a comma, LFW's format otherwise.

    Args:
        held: the images that there are, as in ``read_lfw``.

    Raises:
        PairListError, TableError: neither, or an entry that cannot be.
    """
    first = text.lstrip("\ufeff").partition("\n")[0]
    return read_csv(text, where) if "," in first else read_lfw(text, where, held)


def read_lfw(text: str, where: str, held: Container[str] = ()) -> PairList:
    """LFW's pairs.txt: a line "folds n", then for each fold n lines "name i j" (one person) and n lines "name i other j" (two).

    A first line of one number, "n", is a list without folds (LFW's View 1). Image i of a person is ``name/name_000i.jpg``, or
    ``name/000i.jpg`` where more of these are ``held``.
    """
    lines = [line.split() for line in text.lstrip("\ufeff").splitlines() if line.strip()]
    head = lines[0] if lines else []
    if len(head) not in (1, 2) or not all(field.isdecimal() for field in head):
        raise PairListError(
            f"{where}: the first line must be LFW's 'folds pairs' (two numbers), or a CSV header image_a,image_b,same[,fold]; "
            f"found {' '.join(head)[:80]!r}"
        )
    folds, size = (int(head[0]) if len(head) == 2 else 1), int(head[-1])
    if len(lines) - 1 != folds * 2 * size:
        raise PairListError(f"{where}: {folds} folds of {size} + {size} pairs need {folds * 2 * size} lines, found {len(lines) - 1}")

    def rows() -> Iterator[Row]:
        for number, fields in enumerate(lines[1:]):
            same = number // size % 2 == 0
            if len(fields) != (3 if same else 4) or not all(field.isdecimal() for field in (fields[1], fields[-1])):
                form = "name i j" if same else "name i other j"
                raise PairListError(f"{where}: pair {number + 1} must be {form!r}, found {' '.join(fields)[:80]!r}")
            other = fields[0] if same else fields[2]
            fold = number // (2 * size) if len(head) == 2 else None
            yield f"{fields[0]}/{int(fields[1]):04d}.jpg", f"{other}/{int(fields[-1]):04d}.jpg", same, fold

    pairs = PairList.of(rows(), where)
    official = [f"{person}/{person}_{number}" for person, _, number in (name.rpartition("/") for name in pairs.images)]
    short = sum(name in held for name in pairs.images) > sum(name in held for name in official)
    return pairs if short else replace(pairs, images=official)


def read_csv(text: str, where: str) -> PairList:
    """A CSV with a header: image_a, image_b, same (1 or 0), and fold if there is one; identity_a, file_a, identity_b and file_b, of which
    the image is ``identity/file``, may stand for the first two. Other columns are passed over."""
    sides = [name for name in _SIDES if set(name) <= header(text)]
    if not sides or "same" not in header(text):
        raise PairListError(f"{where}: the CSV needs the columns image_a,image_b,same[,fold], not {','.join(sorted(header(text)))[:200]}")
    half = len(sides[0]) // 2

    def rows() -> Iterator[Row]:
        for place, (*names, same, fold) in read_table(text, where, (*sides[0], "same"), ("fold",)):
            yield "/".join(names[:half]), "/".join(names[half:]), truth(same, place), _fold(fold, place)

    return PairList.of(rows(), where)


def read_cfp(read: Callable[[str], str], protocol: str = "FP") -> PairList:
    """CFP's lists (Sengupta et al., WACV 2016): ten splits of genuine and impostor pairs, frontal-profile or frontal-frontal.

    ``Protocol/Split/FP/01/same.txt`` and ``diff.txt`` hold lines "i,j": image i of ``Protocol/Pair_list_F.txt`` (frontal) with image j of
    ``Protocol/Pair_list_P.txt`` (profile), from 1 on; with FF both numbers are of the first list. A line of a list is "i path", the path as
    seen from ``Protocol``: ``../Data/Images/001/frontal/01.jpg``.

    Args:
        read: the text of a file by its path below CFP's root.
        protocol: "FP" or "FF".

    Raises:
        PairListError: a list is not as described.
    """
    if protocol not in _CFP_LISTS:
        raise PairListError(f"CFP has no protocol {protocol!r}: choose FP (frontal-profile) or FF (frontal-frontal)")
    names = {kind: _cfp_images(read(f"Protocol/Pair_list_{kind}.txt"), kind) for kind in sorted(set(_CFP_LISTS[protocol]))}

    def image(kind: str, number: str, place: str) -> str:
        if number not in names[kind]:
            raise PairListError(f"{place} names image {number}, which Protocol/Pair_list_{kind}.txt does not have")
        return names[kind][number]

    def rows() -> Iterator[Row]:
        left, right = _CFP_LISTS[protocol]
        for split in range(1, CFP_SPLITS + 1):
            for file, same in (("same.txt", True), ("diff.txt", False)):
                place = f"Protocol/Split/{protocol}/{split:02d}/{file}"
                for a, b in _numbers(read(place), place):
                    yield image(left, a, place), image(right, b, place), same, split - 1

    return PairList.of(rows(), f"CFP's protocol {protocol}")


def of_bin(pairs: bin_file.Pairs, where: str) -> PairList:
    """The pairs of a ``.bin`` file. An image's key is the sha256 of its bytes, so that one given twice counts as one."""
    keys = [digest(image) for image in pairs.images]
    return PairList.of(((keys[2 * i], keys[2 * i + 1], bool(same), None) for i, same in enumerate(pairs.same)), where)


def digest(image: bytes) -> str:
    """The key of an image that has no name."""
    return hashlib.sha256(image).hexdigest()


def truth(text: str, place: str) -> bool:
    """A cell that says whether two images are of one person. Raises PairListError."""
    value = _TRUTH.get(text.strip().lower())
    if value is None:
        raise PairListError(f"{place}: the column 'same' must be 1 or 0, found {text[:40]!r}")
    return value


def require_inside(name: str, where: str) -> str:
    """The name of an image, unless it leads out of the root of the images. Raises PairListError."""
    if not name.strip("/") or name.startswith("/") or ".." in name.split("/"):
        raise PairListError(f"{where} names the image {name[:80]!r}: give paths below the root of the images, without '..'")
    return name


def _fold(text: str, place: str) -> int | None:
    if not text:
        return None
    if not re.fullmatch(r"\d{1,9}", text):
        raise PairListError(f"{place}: the column 'fold' must be a whole number from 0 on, found {text[:40]!r}")
    return int(text)


def _cfp_images(text: str, kind: str) -> dict[str, str]:
    """Number -> path below CFP's root."""
    names = dict[str, str]()
    for line in filter(None, map(str.strip, text.splitlines())):
        number, _, path = line.partition(" ")
        if not number.isdecimal() or not path.strip().startswith("../"):
            raise PairListError(f"Protocol/Pair_list_{kind}.txt: a line must be 'number ../Data/...', found {line[:80]!r}")
        names[number] = path.strip().removeprefix("../")
    return names


def _numbers(text: str, place: str) -> Iterator[tuple[str, str]]:
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"(\d+)\s*,\s*(\d+)", line)
        if not match:
            raise PairListError(f"{place}: a line must be two numbers 'i,j', found {line[:80]!r}")
        yield match[1], match[2]
