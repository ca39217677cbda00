"""Random masking without reconstruction: what FaceMAE's network sees, handed out as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from facemae.masking import count_visible, random_mask
from facemae.protection.blocks import spread
from facemae.protection.dial import Dial
from facemae.protection.protocol import GREY, SIDE, check_batch, check_option

NUM_SEEDS = 4
"""Rounds of a repair."""


class RandomMaskProtection:
    """Paints random patches grey: for the same seed, key and patch size the very patches that FaceMAE hides (`facemae.masking`).

    What is not grey is the original, pixel for pixel. The seed is no secret: the picture shows the mask.

    Args:
        strength: hidden share of the patches, above 0 to below 1.
        seed: chooses the masks, together with each picture's key.
        patch_size: side of a patch in pixels; patches at the right and lower border are smaller where they do not fit.

    Raises:
        ValueError: strength or patch size is out of range, or together they hide nothing.
    """

    name = "random_mask"
    dial = Dial("hidden share of the patches", 0, 1, 0.75, open_low=True, open_high=True)

    def __init__(self, strength: float | None = None, seed: int = 0, patch_size: int = 16) -> None:
        self.strength, self.seed = self.dial.checked(self.name, strength), seed
        self.patch_size = check_option(self.name, "patch_size", patch_size)
        patches = (-(-SIDE // self.patch_size)) ** 2
        if count_visible(patches, self.strength) == patches:
            raise ValueError(
                f"{self.name}: strength {self.strength:g} hides none of the {patches} patches of {self.patch_size} pixels of a face: "
                "give a larger strength or smaller patches"
            )

    def describe(self) -> dict[str, Any]:
        """Returns method, strength, seed and patch size; see `Protection.describe`."""
        return {"method": self.name, "strength": self.strength, "seed": self.seed, "options": {"patch_size": self.patch_size}}

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Hides patches of every picture; see `Protection.protect`."""
        check_batch(pictures, keys)
        height, width = pictures.shape[1:3]
        grid = -(-height // self.patch_size), -(-width // self.patch_size)
        shown = np.zeros((len(pictures), grid[0] * grid[1]), bool)
        np.put_along_axis(shown, random_mask(keys, grid[0] * grid[1], self.strength, self.seed), True, axis=1)
        shown = spread(shown.reshape(-1, *grid), self.patch_size, height, width)
        return np.where(shown[..., None], pictures, np.uint8(GREY))

    def variants(self, skip: int = 0) -> Sequence[RandomMaskProtection]:
        """Other seeds, at the same strength; see `Protection.variants`."""
        seeds = range(self.seed + skip + 1, self.seed + skip + NUM_SEEDS + 1)
        return [RandomMaskProtection(self.strength, seed, self.patch_size) for seed in seeds]
