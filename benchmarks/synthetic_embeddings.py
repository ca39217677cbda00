"""Embeddings with a known truth, made shard by shard: people as clusters, protected images that are linked to their source or not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SyntheticEmbeddings:
    """Unit vectors of people whose centres have a decaying spectrum, as face recognisers' have.

    Attributes:
        dim: length of a vector.
        images_per_identity: of every person.
        leak: share of the protected images that lie beside their source; the others lie anywhere.
        seed: of everything.
    """

    dim: int = 512
    images_per_identity: int = 20
    leak: float = 0.05
    seed: int = 0

    def originals(self, shard: int, images: int) -> np.ndarray:
        """One shard of originals, float16 (images, dim)."""
        rng = np.random.default_rng([self.seed, shard, 0])
        people = -(-images // self.images_per_identity)
        centres = np.repeat(self._directions(rng, people), self.images_per_identity, axis=0)[:images]
        return _unit(centres + 0.8 * self._directions(rng, images)).astype(np.float16)

    def protected(self, shard: int, originals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What protection made of a shard of originals, float16 (N, dim), and which of its images leak, bool (N,)."""
        rng = np.random.default_rng([self.seed, shard, 1])
        leaks = rng.random(len(originals)) < self.leak
        noise = self._directions(rng, len(originals))
        linked = originals.astype(np.float32) + 0.4 * noise
        return _unit(np.where(leaks[:, None], linked, noise)).astype(np.float16), leaks

    def _directions(self, rng: np.random.Generator, count: int) -> np.ndarray:
        spectrum = np.arange(1, self.dim + 1, dtype=np.float32) ** -0.5
        return _unit(rng.standard_normal((count, self.dim), np.float32) * spectrum)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
