"""Gaussian blur, the oldest protection of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from facemae.protection.deterministic import DeterministicProtection
from facemae.protection.dial import Dial
from facemae.protection.protocol import check_batch

BITS = 20
"""The kernel's weights are whole multiples of 2^-20: two passes over 8-bit pixels then need 48 bits, exact in float64 in any order."""


class BlurProtection(DeterministicProtection):
    """Convolves every colour with a Gaussian; the border mirrors the picture, the border's pixels twice (scipy's "reflect").

    The arithmetic is exact, so the bytes are the same on every machine. Nothing random: whoever knows sigma can deconvolve, and train on
    pictures blurred alike.

    Args:
        strength: sigma in pixels, above 0 to 112.

    Raises:
        ValueError: the strength is out of range.
    """

    name = "blur"
    dial = Dial("sigma of the Gaussian in pixels", 0, 112, 4, open_low=True)

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Blurs every picture; the keys do not matter; see `Protection.protect`."""
        check_batch(pictures, keys)
        blurred = np.empty_like(pictures)
        rows, columns = (_matrix(size, self.strength) for size in pictures.shape[1:3])
        for picture, out in zip(pictures, blurred, strict=True):  # one at a time stays in the core's cache
            sums = _pass(columns, _pass(rows, picture.astype(np.float64)))
            out[:] = np.floor(sums * 2.0 ** (-2 * BITS) + 0.5)
        return blurred


def _pass(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Blurs along the first axis and turns the picture over: (H, W, 3) -> (W, H, 3)."""
    height, width, colors = values.shape
    return (matrix @ values.reshape(height, width * colors)).reshape(values.shape).swapaxes(0, 1)


@lru_cache(maxsize=16)
def _matrix(size: int, sigma: float) -> np.ndarray:
    """The blur along a side as float64 (size, size) of whole numbers; every row sums to 2^BITS. The kernel ends at 4 sigma."""
    radius = math.ceil(4 * sigma)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-((offsets / sigma) ** 2) / 2)
    weights = np.rint(weights * (2**BITS / weights.sum()))
    weights[radius] += 2**BITS - weights.sum()  # what rounding left over
    matrix = np.zeros((size, size))
    for offset, weight in zip(offsets, weights, strict=True):
        places = (np.arange(size) + offset) % (2 * size)
        np.add.at(matrix, (np.arange(size), np.minimum(places, 2 * size - 1 - places)), weight)
    return matrix
