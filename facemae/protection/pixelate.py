"""Pixelation: every block of pixels becomes its mean colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from facemae.protection.blocks import block_means, spread
from facemae.protection.deterministic import DeterministicProtection
from facemae.protection.dial import Dial
from facemae.protection.protocol import check_batch


class PixelateProtection(DeterministicProtection):
    """Replaces every block by its mean, rounded half up; blocks at the right and lower border are smaller where they do not fit.

    Args:
        strength: side of a block in pixels, a whole number from 2 to 112.

    Raises:
        ValueError: the strength is out of range.
    """

    name = "pixelate"
    dial = Dial("side of a block in pixels", 2, 112, 8, whole=True)

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Pixelates every picture; the keys do not matter; see `Protection.protect`."""
        check_batch(pictures, keys)
        block = int(self.strength)
        return spread(block_means(pictures, block), block, *pictures.shape[1:3])
