"""Pixelation: every block of pixels becomes its mean colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from facemae.protection.blocks import block_means, spread
from facemae.protection.dial import Dial
from facemae.protection.protocol import check_batch


class PixelateProtection:
    """Replaces every block by its mean, rounded half up; blocks at the right and lower border are smaller where they do not fit.

    Args:
        strength: side of a block in pixels, a whole number from 2 to 112.

    Raises:
        ValueError: the strength is out of range.
    """

    name = "pixelate"
    dial = Dial("side of a block in pixels", 2, 112, 8, whole=True)

    def __init__(self, strength: float | None = None) -> None:
        self.strength = int(self.dial.checked(self.name, strength))

    def describe(self) -> dict[str, Any]:
        """Returns method and strength; see `Protection.describe`."""
        return {"method": self.name, "strength": self.strength}

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Pixelates every picture; the keys do not matter; see `Protection.protect`."""
        check_batch(pictures, keys)
        return spread(block_means(pictures, self.strength), self.strength, *pictures.shape[1:3])

    def variants(self, skip: int = 0) -> Sequence[PixelateProtection]:
        """Returns nothing: there is nothing random; see `Protection.variants`."""
        return []
