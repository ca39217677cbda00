"""Masking of fixed facial areas: eyes and mouth, which FaceMAE's authors compare random masking with (arXiv 2205.11090)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from facemae.protection.deterministic import DeterministicProtection
from facemae.protection.dial import Dial
from facemae.protection.protocol import GREY, check_batch

TEMPLATE = 112
"""Side of the ArcFace template in pixels."""
LEFT_EYE, RIGHT_EYE = (38.2946, 51.6963), (73.5318, 51.5014)
LEFT_MOUTH, RIGHT_MOUTH = (41.5493, 92.3655), (70.7299, 92.2041)
"""Points (x, y) of the template, where alignment puts them in every picture."""
EYE_HALF, MOUTH_HALF = (13.0, 8.0), (21.0, 10.0)
"""Half width and half height of the rectangles at strength 1 (our reading: the whole eye without the brow, the lips)."""


class FixedMaskProtection(DeterministicProtection):
    """Paints one rectangle around each eye and one around the mouth grey: the same places in every picture, since faces are aligned.

    What is not grey is the original, pixel for pixel.

    Args:
        strength: scale of the rectangles, above 0 to 2; at 2 of the middle of the face the nose alone is left.

    Raises:
        ValueError: the strength is out of range.
    """

    name = "fixed_mask"
    dial = Dial("scale of the rectangles over eyes and mouth", 0, 2, 1, open_low=True)

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Hides the areas of every picture; the keys do not matter; see `Protection.protect`."""
        check_batch(pictures, keys)
        masked = pictures.copy()
        for rows, columns in self._rectangles(*pictures.shape[1:3]):
            masked[:, rows, columns] = GREY
        return masked

    def _rectangles(self, height: int, width: int) -> Iterator[tuple[slice, slice]]:
        """The pixels (y, x) whose middles lie in a rectangle; the template is stretched to the picture."""
        middle = (LEFT_MOUTH[0] + RIGHT_MOUTH[0]) / 2, (LEFT_MOUTH[1] + RIGHT_MOUTH[1]) / 2
        for point, half in ((LEFT_EYE, EYE_HALF), (RIGHT_EYE, EYE_HALF), (middle, MOUTH_HALF)):
            across, down = (
                _pixels(center, extent * self.strength, size) for center, extent, size in zip(point, half, (width, height), strict=True)
            )
            yield down, across


def _pixels(center: float, half: float, size: int) -> slice:
    """Pixels of a side of `size` whose middles are within `half` of `center`, both on the template's scale."""
    middles = (np.arange(size) + 0.5) * (TEMPLATE / size) - 0.5
    inside = np.flatnonzero(np.abs(middles - center) <= half)
    return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0)
