"""The one input file of the search: encoded faces, pairs and a recogniser as tensors of a safetensors file, which can run no code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.search.packed import PackedRecognizer

SCHEMA = "facemae-search-1"
MAX_BYTES = 64 << 20
_PARTS = ("train", "protected", "test")
_SIDE = 112


@dataclass(frozen=True)
class Pictures:
    """N encoded faces.

    Attributes:
        data: uint8 (bytes,), the JPEGs one after another.
        ends: int64 (N,), where each ends.
        people: int64 (N,), whose face it is, 0 .. P - 1 with no gap. No name of anybody is in a bundle.
    """

    data: Tensor
    ends: Tensor
    people: Tensor

    @classmethod
    def of(cls, files: Sequence[bytes], people: Sequence[int]) -> Pictures:
        """Joins files."""
        data = torch.from_numpy(np.frombuffer(b"".join(files), np.uint8).copy())
        return cls(data, torch.tensor([len(file) for file in files]).cumsum(0), torch.tensor(people))

    def __len__(self) -> int:
        return len(self.ends)

    def decode(self) -> Tensor:
        """uint8 (N, 112, 112, 3).

        Raises:
            ValueError: a picture that is no RGB JPEG of 112 x 112 pixels; the message has its number.
        """
        pictures = torch.empty((len(self), _SIDE, _SIDE, 3), dtype=torch.uint8)
        for number, (start, end) in enumerate(zip([0, *self.ends.tolist()[:-1]], self.ends.tolist(), strict=True)):
            try:
                pictures[number] = decode_jpeg(self.data[start:end], mode=ImageReadMode.RGB).permute(1, 2, 0)
            except RuntimeError as error:
                raise ValueError(f"picture {number} of the bundle is no JPEG of {_SIDE} x {_SIDE} pixels ({error}): pack again") from None
        return pictures


@dataclass(frozen=True)
class Bundle:
    """What the search works on.

    Attributes:
        train: people that FaceMAE (and the compact attacker) learn from.
        protected: people whose faces are redrawn; nobody of `train`.
        test: faces of the verification pairs; nobody of the other two. Their `people` are their folds, 0, 1, ...
        pairs: int64 (M, 3): rows of `test`, and 1 where they are the same person.
        recognizer: of the relation loss, and first attacker.
        start: weights of a masked autoencoder to start from; empty where there is none.
        facts: where it all came from.
        sha256: of the file.
    """

    train: Pictures
    protected: Pictures
    test: Pictures
    pairs: Tensor
    recognizer: PackedRecognizer
    start: dict[str, Tensor]
    facts: dict[str, Any]
    sha256: str = ""


def write_bundle(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Writes the file, and FILE.sha256 beside it as sha256sum does.

    Raises:
        ValueError: it would be larger than 64 MiB.
    """
    save_file(tensors, path, {"schema": SCHEMA, "facts": json.dumps(facts)})
    size = path.stat().st_size
    if size > MAX_BYTES:
        path.unlink()
        raise ValueError(
            f"{path} would have {size / (1 << 20):.1f} MiB, the limit is 64: give fewer images by --train-images or --per-person"
        )
    sha256 = _sha256(path)
    path.with_name(path.name + ".sha256").write_text(f"{sha256}  {path.name}\n")
    return sha256


def read_bundle(path: Path, expected: str | None = None) -> Bundle:
    """Reads and checks a bundle.

    Args:
        path: written by `write_bundle`.
        expected: its sha256; by default what FILE.sha256 beside it says.

    Raises:
        ValueError: another sha256, no bundle, or tensors that do not fit each other.
        FileNotFoundError: the file, or the word on its sha256, is missing.
    """
    beside = path.with_name(path.name + ".sha256")
    if not path.is_file() or (expected is None and not beside.is_file()):
        missing = path if not path.is_file() else beside
        raise FileNotFoundError(
            f"{missing} is missing: make it with python -m benchmarks.search.pack and copy both files, or give --sha256"
        )
    wanted, actual = expected or beside.read_text().split()[0], _sha256(path)
    if wanted != actual:
        raise ValueError(f"{path} has sha256 {actual}, expected {wanted}: it is damaged or another file; copy it again")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}): make it with python -m benchmarks.search.pack") from error
    if facts.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {facts.get('schema')!r}, not {SCHEMA!r}: make it with python -m benchmarks.search.pack")
    return dataclasses.replace(_assemble(tensors, json.loads(facts["facts"]), path), sha256=actual)


def _assemble(tensors: dict[str, Tensor], facts: dict[str, Any], path: Path) -> Bundle:
    try:
        parts: dict[str, Any] = {name: Pictures(*(tensors[f"{name}.{field}"] for field in ("data", "ends", "people"))) for name in _PARTS}
        network = facts["recognizer"]
        packed = PackedRecognizer(network["steps"], _under("recognizer.", tensors), network["mean"], network["std"])
        bundle = Bundle(**parts, pairs=tensors["pairs"], recognizer=packed, start=_under("start.", tensors), facts=facts)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: make it with python -m benchmarks.search.pack") from error
    for name, part in parts.items():
        if not len(part) or len(part.people) != len(part) or int(part.ends[-1]) != len(part.data):
            raise ValueError(f"{path}: the pictures, ends and people of {name} do not fit each other: pack again")
    if bundle.pairs.ndim != 2 or not len(bundle.pairs) or int(bundle.pairs[:, :2].max()) >= len(bundle.test):
        raise ValueError(f"{path}: the pairs name pictures that are not there: pack again")
    return bundle


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
