from __future__ import annotations

import math

import numpy as np
import pytest

from facemae.protection.pixelate import PixelateProtection


@pytest.mark.parametrize("block", [2, 5, 8, 16, 112])
def test_equals_block_means_by_loops(block: int) -> None:
    pictures = np.random.default_rng(2).integers(0, 256, (2, 21, 34, 3), dtype=np.uint8)
    expected = np.empty_like(pictures)
    for picture in range(2):
        for top in range(0, 21, block):
            for left in range(0, 34, block):
                for color in range(3):
                    values = [int(v) for v in pictures[picture, top : top + block, left : left + block, color].ravel()]
                    mean = math.floor(sum(values) / len(values) + 0.5)
                    expected[picture, top : top + block, left : left + block, color] = mean
    np.testing.assert_array_equal(PixelateProtection(block).protect(pictures, ["a", "b"]), expected)
