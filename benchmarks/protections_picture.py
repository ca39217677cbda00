"""Draws docs/images/protections.png: a row a method, the strength rising to the right, on drawn faces (no real person)."""

from __future__ import annotations

import argparse
import io

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from facemae.protection import ShardProtection, create_protection
from facemae.synthetic import SyntheticFaces

ROWS: dict[str, tuple[float, ...]] = {
    "blur": (1, 2, 4, 8, 16),
    "pixelate": (4, 8, 16, 28, 56),
    "noise": (10, 25, 50, 100, 200),
    "random_mask": (0.25, 0.5, 0.75, 0.9, 0.96),
    "fixed_mask": (0.5, 0.75, 1, 1.5, 2),
    "k_same": (2, 3, 5, 10, 30),
    "pixel_dp": (20, 5, 1, 0.5, 0.1),
}
PEOPLE = 60
"""Of which the first is shown; k-same averages over all."""


def shown(method: str, strength: float, pictures: np.ndarray) -> np.ndarray:
    """The first picture, protected: uint8 (112, 112, 3)."""
    protection, keys = create_protection(method, strength=strength), [f"{row:03d}" for row in range(len(pictures))]
    if isinstance(protection, ShardProtection):
        return protection.protect_shard(pictures, keys, range(len(pictures))).pictures[0]
    return protection.protect(pictures[:1], keys[:1])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="docs/images/protections.png")
    arguments = parser.parse_args()
    pictures = SyntheticFaces(PEOPLE, 1, seed=11).render(np.arange(PEOPLE))
    columns = max(map(len, ROWS.values())) + 1
    figure, axes = plt.subplots(len(ROWS), columns, figsize=(1.15 * columns + 0.9, 1.32 * len(ROWS)))
    for line, (method, strengths) in zip(axes, ROWS.items(), strict=True):
        tiles = [pictures[0], *(shown(method, strength, pictures) for strength in strengths)]
        for axis, tile, title in zip(line, tiles, ["original", *(f"{strength:g}" for strength in strengths)], strict=True):
            axis.imshow(tile)
            axis.set_title(title, fontsize=8, pad=2)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(method, fontsize=9)
    figure.tight_layout(pad=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(arguments.output, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main()
