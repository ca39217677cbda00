"""Additive Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from facemae.protection.dial import Dial
from facemae.protection.noise_source import random_words, seed_facts
from facemae.protection.protocol import check_batch

NUM_SEEDS = 4
"""Rounds of a repair."""


class NoiseProtection:
    """Adds independent normal noise to every colour of every pixel, then rounds and clips to 0..255.

    The noise is a function of (seed, key): **keep the seed secret**, or whoever has it takes the noise away again. The lineage has its
    hash alone, and a set made with a seed that can be guessed carries a warning and is never released.

    Args:
        strength: standard deviation on the scale 0..255, above 0 to 255.
        seed: any integer; for a release one of 128 random bits.

    Raises:
        ValueError: the strength is out of range.
    """

    name = "noise"
    dial = Dial("standard deviation of the noise, of 255", 0, 255, 50, open_low=True)

    def __init__(self, strength: float | None = None, seed: int = 0) -> None:
        self.strength, self.seed = self.dial.checked(self.name, strength), seed

    def describe(self) -> dict[str, Any]:
        """Returns method, strength and the seed's hash; see `Protection.describe`."""
        return {"method": self.name, "strength": self.strength, **seed_facts(self.seed)}

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Adds noise to every picture; see `Protection.protect`."""
        check_batch(pictures, keys)
        noisy = np.empty_like(pictures)
        for picture, key, out in zip(pictures, keys, noisy, strict=True):
            noise = _normal(random_words(self.name, key, self.seed, (picture.size + 1) // 2))[: picture.size]
            out[:] = np.rint(picture + self.strength * noise.reshape(picture.shape)).clip(0, 255)
        return noisy

    def variants(self, skip: int = 0) -> Sequence[NoiseProtection]:
        """Other seeds, at the same strength; see `Protection.variants`."""
        return [NoiseProtection(self.strength, self.seed + number) for number in range(skip + 1, skip + NUM_SEEDS + 1)]


def _normal(words: np.ndarray) -> np.ndarray:
    """uint64 (N,) -> standard normal float32 (2 N,) by Box and Muller (1958): a radius and an angle of 32 bits each."""
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32)).astype(np.float32)
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2 * np.pi * 2.0**-32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
