"""Square blocks of pictures: sums by block, and blocks back to pixels. Whole numbers throughout, so exact on every machine."""

from __future__ import annotations

import numpy as np


def block_sums(pictures: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums the pixels of every block; the last blocks of a side are smaller where `block` does not divide it.

    Args:
        pictures: uint8 (N, H, W, 3).
        block: side of a block in pixels, 1 or more.

    Returns:
        int64 (N, R, C, 3) the sums, with R = ceil(H / block), C = ceil(W / block), and int64 (R, C, 1) the pixels in each block.
    """
    height, width = pictures.shape[1:3]
    rows, columns = np.arange(0, height, block), np.arange(0, width, block)
    sums = np.empty((len(pictures), len(rows), len(columns), 3), np.int64)
    for picture, out in zip(pictures, sums, strict=True):  # all at once, numpy would hold eight bytes a pixel
        np.add.reduceat(np.add.reduceat(picture, rows, axis=0, dtype=np.int64), columns, axis=1, out=out)
    sides = [np.diff(starts, append=size) for starts, size in ((rows, height), (columns, width))]
    return sums, np.outer(*sides)[:, :, None]


def block_means(pictures: np.ndarray, block: int) -> np.ndarray:
    """The mean of every block, rounded half up: uint8 (N, R, C, 3); see `block_sums`."""
    sums, counts = block_sums(pictures, block)
    return ((2 * sums + counts) // (2 * counts)).astype(np.uint8)


def spread(blocks: np.ndarray, block: int, height: int, width: int) -> np.ndarray:
    """Paints every pixel with its block's value: (N, R, C, ...) -> (N, H, W, ...)."""
    return blocks.repeat(block, axis=1)[:, :height].repeat(block, axis=2)[:, :, :width]
