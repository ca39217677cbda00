"""What every protection offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from facemae.protection.dial import Dial

SIDE = 112
"""Side of an aligned face in pixels."""
GREY = 128
"""What is painted over hidden pixels. One value for all: the picture's own mean would tell of what is hidden."""


class Protection(Protocol):
    """Turns pictures into protected ones.

    The output for a picture depends on (picture, key, options, weights) alone: byte for byte the same whatever the
    batch size, the neighbours or the number of threads.

    Attributes:
        name: its key in `PROTECTIONS`.
        dial: its strength; None where there is nothing to turn.
    """

    name: str
    dial: Dial | None

    def describe(self) -> dict[str, Any]:
        """Returns what determines the output, ready for JSON: it goes into the protected data set's lineage.

        A key `warning` says that the set must never be released, and why.
        """
        ...

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Protects a batch.

        Args:
            pictures: uint8 (N, H, W, 3), RGB.
            keys: N sample keys.

        Returns:
            uint8 (N, H, W, 3), RGB.

        Raises:
            ValueError: the pictures are not of this form, or not as many as the keys.
        """
        ...

    def variants(self, skip: int = 0) -> Sequence[Protection]:
        """Other protections of the same method and weights, in the order in which a repair tries them on a picture that is traced.

        Args:
            skip: rounds that earlier repairs made; their masks do not come again.

        Returns:
            None of them where the method has nothing to vary.
        """
        ...


@dataclass(frozen=True)
class ProtectedShard:
    """A whole shard, protected.

    Attributes:
        pictures: uint8 (N, H, W, 3), RGB; a row that is left out is grey.
        left_out: why a picture could not be protected, by its row.
    """

    pictures: np.ndarray
    left_out: Mapping[int, str]


@runtime_checkable
class ShardProtection(Protection, Protocol):
    """A protection that sees a whole shard at once, and who is in it: its output for a picture depends on the shard's other pictures.

    Byte for byte the same whatever the order of the shard's pictures. `protect` refuses with a ValueError. `describe` says
    `min_identities`, how many people a shard must have, so that a data set can be refused before the work starts.
    """

    def protect_shard(self, pictures: np.ndarray, keys: Sequence[str], identities: Sequence[int]) -> ProtectedShard:
        """Protects a shard.

        Args:
            pictures: uint8 (N, H, W, 3), RGB: all of a shard.
            keys: N sample keys.
            identities: N labels.

        Raises:
            ValueError: wrong form or numbers, or the shard cannot be protected.
        """
        ...


def check_batch(pictures: np.ndarray, keys: Sequence[str]) -> None:
    """Raises ValueError unless `pictures` is uint8 (N, H, W, 3) with one key each."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}: give uint8 (N, H, W, 3) RGB")
    if len(keys) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures with {len(keys)} keys: give one key for each picture")


def check_option(method: str, name: str, value: int) -> int:
    """Returns a whole-number option of 1 or more; raises ValueError where it is none."""
    if value != int(value) or value < 1:
        raise ValueError(f"{method}: {name} is {value}: give a whole number of 1 or more")
    return int(value)
