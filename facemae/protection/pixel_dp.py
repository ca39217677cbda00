"""Pixelation with differential privacy (Fan, DBSec 2018, doi 10.1007/978-3-319-95729-6_10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from facemae.protection.blocks import block_sums, spread
from facemae.protection.dial import Dial
from facemae.protection.noise_source import random_words, seed_facts, uniform
from facemae.protection.protocol import SIDE, check_batch, check_option


class PixelDpProtection:
    """Adds Laplace noise to the mean of every block, then rounds and clips to 0..255.

    Two pictures are m-neighbours when they differ in at most m pixels. The block means of one colour then differ by at most 255 m / b^2 in
    all, so noise of scale 255 m / (b^2 epsilon) makes them epsilon-indistinguishable. A block at the border with c < b^2 pixels takes
    255 m / (c epsilon), which keeps the same budget. Rounding, clipping and the JPEG come after, and cost nothing.

    What that amounts to: m pixels are hidden, not a face. All three colours of m pixels cost 3 epsilon, and pictures that differ
    everywhere (another person) 3 epsilon H W / m; a person's pictures add up. `describe` states these budgets.

    The noise is a function of (seed, key): **keep the seed secret**, or whoever has it takes the noise away again. The lineage has its
    hash alone, and a set made with a seed that can be guessed carries a warning and is never released. The guarantee is proven for noise
    of real numbers; in floating point the low bits of a Laplace sample can tell the true value (Mironov, CCS 2012). Only 8 rounded bits
    leave this class, which takes those bits away, but no proof is claimed.

    Args:
        strength: epsilon of one colour of an m-neighbourhood, above 0 to 1000; smaller hides more.
        seed: any integer; for a release one of 128 random bits.
        neighborhood: m, the pixels that are to be indistinguishable.
        block: b, side of a block in pixels.

    Raises:
        ValueError: an option is out of range.
    """

    name = "pixel_dp"
    dial = Dial("epsilon of one color of an m-neighborhood; smaller hides more", 0, 1000, 0.5, open_low=True, rising=False)

    def __init__(self, strength: float | None = None, seed: int = 0, neighborhood: int = 16, block: int = 16) -> None:
        self.strength, self.seed = self.dial.checked(self.name, strength), seed
        self.neighborhood = check_option(self.name, "neighborhood", neighborhood)
        self.block = check_option(self.name, "block", block)
        if self.block > SIDE:
            raise ValueError(f"{self.name}: block is {block}: a face has {SIDE} pixels a side, give as many or fewer")

    def describe(self) -> dict[str, Any]:
        """Returns method, options, the seed's hash and the budgets; see `Protection.describe`."""
        budgets = {
            "neighborhood_one_color": self.strength,
            "neighborhood": 3 * self.strength,
            f"picture_{SIDE}": 3 * self.strength * SIDE * SIDE / self.neighborhood,
            "note": "one picture; the budgets of a person's pictures add up",
        }
        options = {"neighborhood": self.neighborhood, "block": self.block}
        return {"method": self.name, "strength": self.strength, **seed_facts(self.seed), "options": options, "epsilon": budgets}

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Pixelates every picture with noise; see `Protection.protect`."""
        check_batch(pictures, keys)
        sums, counts = block_sums(pictures, self.block)
        noise = np.empty(sums.shape)
        for row, key in zip(noise, keys, strict=True):  # one at a time, so that no neighbour decides how a logarithm is computed
            row[:] = _laplace(random_words(self.name, key, self.seed, row.size)).reshape(row.shape)
        means = (sums + noise * (255 * self.neighborhood / self.strength)) / counts
        return spread(np.rint(means).clip(0, 255).astype(np.uint8), self.block, *pictures.shape[1:3])

    def variants(self, skip: int = 0) -> Sequence[PixelDpProtection]:
        """Returns nothing: to choose among draws by what an attacker makes of them would void the guarantee; see `Protection.variants`."""
        return []


def _laplace(words: np.ndarray) -> np.ndarray:
    """uint64 (N,) -> Laplace float64 (N,) of scale 1, by the inverse of its distribution function."""
    shares = uniform(words)
    return np.where(shares < 0.5, 1.0, -1.0) * np.log(2 * np.minimum(shares, 1 - shares))
