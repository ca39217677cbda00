"""What every protection offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Protection(Protocol):
    """Turns pictures into protected ones.

    The output for a picture depends on (picture, key, options, weights) alone: byte for byte the same whatever the
    batch size, the neighbours or the number of threads.
    """

    name: str

    def describe(self) -> dict[str, Any]:
        """Returns what determines the output, ready for JSON: it goes into the protected data set's lineage."""
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


def check_batch(pictures: np.ndarray, keys: Sequence[str]) -> None:
    """Raises ValueError unless `pictures` is uint8 (N, H, W, 3) with one key each."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}: give uint8 (N, H, W, 3) RGB")
    if len(keys) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures with {len(keys)} keys: give one key for each picture")
