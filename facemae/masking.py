"""Random masks that depend on the seed and the picture's key alone.

FaceMAE hides a random 75 % of a face's patches (arXiv 2205.11090). Which ones is decided here by hashing, not by a
random generator's state, so that any worker, in any order, hides the same patches of the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: 2^64 / golden ratio, odd


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Returns how many of `num_patches` patches stay visible: at least 1, the hidden share rounded half up.

    Raises:
        ValueError: `num_patches` is not positive or `mask_ratio` is outside [0, 1).
    """
    if num_patches < 1:
        raise ValueError(f"num_patches is {num_patches}: a picture has at least one patch")
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is {mask_ratio}: give the hidden share of patches, from 0 to below 1")
    return max(1, num_patches - math.floor(num_patches * mask_ratio + 0.5))


def random_mask(keys: Sequence[str], num_patches: int, mask_ratio: float, seed: int) -> np.ndarray:
    """Chooses the visible patches of each picture.

    A patch's score is splitmix64 seeded with blake2b(seed/key); the lowest scores stay visible. splitmix64 permutes the
    64-bit integers, so no two patches of a picture tie.

    Args:
        keys: N sample keys. In training `f"{epoch}/{key}"` gives a new mask every epoch.
        num_patches: patches of one picture.
        mask_ratio: hidden share of the patches, in [0, 1).
        seed: any integer.

    Returns:
        int64 (N, num_visible): indices of the visible patches, ascending in each row.

    Raises:
        ValueError: see `count_visible`.
    """
    num_visible = count_visible(num_patches, mask_ratio)
    scores = random_bits(keys, num_patches, seed)
    visible = np.argpartition(scores, num_visible - 1, axis=1)[:, :num_visible]
    return np.sort(visible, axis=1).astype(np.int64)


def random_bits(keys: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Random numbers that are a function of the seed and each key alone.

    Args:
        keys: N sample keys.
        count: numbers for each key; more of them leave the first ones as they are.
        seed: any integer.

    Returns:
        uint64 (N, count), no two the same in a row.
    """
    starts = np.array([_hash_key(key, seed) for key in keys], dtype=np.uint64).reshape(-1, 1)
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN_RATIO
    return _mix(starts + steps)


def _hash_key(key: str, seed: int) -> int:
    # surrogatepass: keys come from tar member names, which need not be valid UTF-8
    return int.from_bytes(blake2b(f"{seed}/{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64's output function on uint64, modulo 2^64 (Steele, Lea, Flood, OOPSLA 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
