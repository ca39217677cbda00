"""Brushes for `facemae.synthetic`: patches of pictures, masks, noise.

Everything here is addition, multiplication, division, comparison and square root on float32, and table look-ups:
operations that IEEE 754 rounds in one way only. An image therefore depends neither on its neighbours in the batch nor on
the machine. Per-pixel `exp` or `sin` would be slower, and their last bit depends on the vector width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32; numpy's own types hold that float32 * 0.5 may be float64, which it never is
Params = dict[str, Floats]

TABLE = 128  # side of the noise tables, a power of two so that the look-up wraps by a bit mask


@dataclass
class Patch:
    """A rectangle of the picture: its colours and, for every pixel, where it lies on the face.

    Attributes:
        colour: float32 (3, N, h, w), 1.0 is white; (3, 2, N, h, w) for a pair of mirrored rectangles.
        x: float32 (N, h, w) face coordinate; in a pair (2, N, h, w), growing outwards on both sides.
        y: float32, like x.
    """

    colour: Floats
    x: Floats
    y: Floats

    def paint(self, mask: Floats, colour: Floats) -> None:
        """Blends colour, (3, N, 1, 1) or (3, N, h, w), over the patch by mask, in [0, 1] and shaped like x."""
        difference = (colour[:, None] if self.colour.ndim == 5 else colour) - self.colour
        difference *= mask
        self.colour += difference

    def darken(self, mask: Floats) -> None:
        """Takes the share mask of the light away."""
        self.colour *= 1 - mask


def clamp(values: Floats) -> Floats:
    """Limits values to [0, 1]."""
    return np.clip(values, 0, 1)


def positive(values: Floats) -> Floats:
    """Sets what is below zero to zero (np.clip is four times as fast with two bounds as with one)."""
    return np.clip(values, 0, np.inf)


def square(values: Floats) -> Floats:
    """values * values."""
    return values * values


def inside(distance: Floats, softness: float = 1.0) -> Floats:
    """Antialiased mask of the points whose signed distance in pixels is negative."""
    return clamp(0.5 - distance * (1 / softness))


def bump(squared_radius: Floats) -> Floats:
    """Smooth blob: 1 in the middle, 0 from radius 1 on."""
    return square(positive(1 - squared_radius))


def mix(first: Floats, second: Floats | float, share: Floats | float) -> Floats:
    """Linear interpolation: first where share is 0, second where it is 1."""
    return first + (second - first) * share


def rgb(red: float, green: float, blue: float) -> Floats:
    """A constant colour as float32 (3, 1, 1, 1)."""
    return np.array([red, green, blue], np.float32).reshape(3, 1, 1, 1)


@lru_cache(maxsize=1)
def noise_tables() -> tuple[Floats, Floats]:
    """Fixed noise: (smooth, white), each float32 (TABLE ** 2,) with mean about 0 and standard deviation about 1."""
    cells = np.arange(1, TABLE * TABLE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    total = np.zeros(TABLE * TABLE, np.float32)
    for _ in range(4):  # a sum of four uniform numbers is close enough to a normal one
        cells = (cells ^ (cells >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        cells ^= cells >> np.uint64(32)
        total += (cells >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    white = (total - 2) * np.float32(1.732)
    smooth = white.reshape(TABLE, TABLE)
    for axis in (0, 0, 1, 1):
        smooth = (np.roll(smooth, 1, axis) + smooth + np.roll(smooth, -1, axis)) * np.float32(1 / 3)
    return (smooth * np.float32(4.4)).ravel(), white


def texture(x: Floats, y: Floats) -> Floats:
    """Smooth noise at table coordinates, about four cells a wave: float32 of the shape of x and y together."""
    cell = (y.astype(np.int32) & (TABLE - 1)) * TABLE + (x.astype(np.int32) & (TABLE - 1))
    # the mask keeps cells in range; "clip" only spares take its own check
    return np.take(noise_tables()[0], cell.astype(np.intp), mode="clip")
