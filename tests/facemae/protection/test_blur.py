from __future__ import annotations

import math

import numpy as np
import pytest

from facemae.protection.blur import BITS, BlurProtection, _matrix


def mirrored(place: int, size: int) -> int:
    """The pixel that a place outside of the picture shows, one step at a time."""
    while not 0 <= place < size:
        place = -1 - place if place < 0 else 2 * size - 1 - place
    return place


def convolved(line: np.ndarray, sigma: float) -> np.ndarray:
    """Direct convolution of one line of numbers in float64."""
    radius, size = math.ceil(4 * sigma), len(line)
    kernel = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-radius, radius + 1)]
    return np.array(
        [sum(w * line[mirrored(at + o, size)] for o, w in zip(range(-radius, radius + 1), kernel, strict=True)) for at in range(size)]
    ) / sum(kernel)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7, 15.0])
def test_equals_direct_convolution(sigma: float) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (1, 14, 9, 3), dtype=np.uint8)
    expected = np.empty((14, 9, 3))
    for color in range(3):
        rows = np.stack([convolved(row, sigma) for row in picture[0, :, :, color].astype(float)])
        expected[:, :, color] = np.stack([convolved(column, sigma) for column in rows.T]).T
    found = BlurProtection(sigma).protect(picture, ["a"])[0]
    assert np.abs(found - expected).max() < 0.501


def test_a_plain_picture_stays_and_no_brightness_is_lost() -> None:
    for value in (0, 1, 127, 255):
        plain = np.full((1, 112, 112, 3), value, np.uint8)
        np.testing.assert_array_equal(BlurProtection(7.3).protect(plain, ["a"]), plain)
    for sigma in (0.3, 4.0, 112.0):
        np.testing.assert_array_equal(_matrix(112, sigma).sum(axis=1), 2.0**BITS)
        assert (_matrix(112, sigma) >= 0).all()
