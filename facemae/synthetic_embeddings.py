"""Embeddings with a known leakage: identities as clusters on the sphere, and protected copies of which a planted share leaks.

No real embeddings come with the truth; these show whether a search and its statistics find what was planted. Each shard is a function of
the seed and its own number alone, so any of them can be made anywhere, in any order, as often as needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_COPY = 0.98
"""Cosine of a leaked copy and its original."""


@dataclass(frozen=True)
class SyntheticShard:
    """One shard, a row an image.

    Attributes:
        originals, protected: float16 (N, dim), unit rows.
        identities: int64 (N,), unique to the shard.
        leaked: bool (N,), where the protected row is a copy.
    """

    originals: np.ndarray
    protected: np.ndarray
    identities: np.ndarray
    leaked: np.ndarray

    def __len__(self) -> int:
        return len(self.identities)


@dataclass(frozen=True)
class SyntheticEmbeddings:
    """A set of originals and its protected counterpart.

    An original is sqrt(w) c + sqrt(1 - w) v: c the centre of its identity and v noise, both uniform on the sphere, v orthogonal to c. So
    two images of an identity have an expected cosine of w = ``within``, two of different people of 0. Its protected row is, with
    probability ``leak``, a copy turned by acos(0.98), about 11.5 degrees, in a random direction; otherwise it is uniform on the sphere and
    knows nothing of its original.

    A copy has its mate at rank 1 unless another original lies within twice that angle (cosine 0.92) of the mate, by the triangle inequality
    of angles. For w = 0.5 the cosine of two noises would have to exceed 0.84, which has a chance below exp(-0.353 (dim - 1)): 1e-9 a pair
    of one identity at 64 dimensions, 1e-78 at 512; for two people it is smaller still (below exp(-0.423 dim)). An unleaked row has its mate
    at rank 1 in one case of N, the size of the gallery, by symmetry. The expected CMC@1 is therefore leak + (1 - leak) / N.

    Attributes:
        num_identities, images: people, and images of each.
        dim: of the embeddings, at least 64: with fewer, an original may have neighbours as near as its copy.
        leak: the planted share, 0 to 1.
        correlation: of two images of one identity in being leaked, in [0, 1): 0 leaks each by itself; above 0 each identity has a share of
            its own, of a beta distribution of that mean.
        within: the expected cosine of two images of one identity, in [0, 0.5].
        shard_identities: people in a shard; the last one may have fewer.
        seed: of everything.

    Raises:
        ValueError: a value is out of range.
    """

    num_identities: int
    images: int
    dim: int = 512
    leak: float = 0.1
    correlation: float = 0.0
    within: float = 0.5
    shard_identities: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "num_identities": (1, np.inf),
            "images": (1, np.inf),
            "dim": (64, np.inf),
            "leak": (0, 1),
            "correlation": (0, 0.999),
            "within": (0, 0.5),
            "shard_identities": (1, np.inf),
            "seed": (0, np.inf),
        }
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} is {value}: give {low} to {high}" if high < np.inf else f"{name} is {value}: give {low} or more")

    @property
    def num_shards(self) -> int:
        """How many shards hold everybody."""
        return -(-self.num_identities // self.shard_identities)

    @property
    def num_images(self) -> int:
        """Images in all shards."""
        return self.num_identities * self.images

    @property
    def expected_cmc1(self) -> float:
        """The expected CMC@1 of the image in a gallery of all originals."""
        return self.leak + (1 - self.leak) / self.num_images

    def shard(self, number: int) -> SyntheticShard:
        """Shard ``number``, counted from 0. Raises ValueError when there is none of that number."""
        if not 0 <= number < self.num_shards:
            raise ValueError(f"there is no shard {number}: they are numbered 0 to {self.num_shards - 1}")
        rng = np.random.default_rng([self.seed, number])
        first = number * self.shard_identities
        people = np.arange(first, min(first + self.shard_identities, self.num_identities))
        identities = np.repeat(people, self.images)
        centers = np.repeat(_unit(rng.standard_normal((len(people), self.dim), np.float32)), self.images, axis=0)
        originals = _turned(centers, self.within**0.5, rng)
        leaked = rng.random(len(identities)) < np.repeat(self._shares(len(people), rng), self.images)
        free = _unit(rng.standard_normal(originals.shape, np.float32))
        protected = np.where(leaked[:, None], _turned(originals, _COPY, rng), free)
        return SyntheticShard(originals.astype(np.float16), protected.astype(np.float16), identities, leaked)

    def _shares(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """The share leaked of each identity, float64 (count,)."""
        if self.correlation == 0 or self.leak in (0, 1):
            return np.full(count, float(self.leak))
        weight = (1 - self.correlation) / self.correlation
        return rng.beta(self.leak * weight, (1 - self.leak) * weight, count)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _turned(rows: np.ndarray, cosine: float, rng: np.random.Generator) -> np.ndarray:
    """Unit rows of this cosine to the given ones, each in a random direction."""
    noise = rng.standard_normal(rows.shape, np.float32)
    noise -= np.einsum("nd,nd->n", noise, rows)[:, None] * rows
    return np.float32(cosine) * rows + np.float32((1 - cosine**2) ** 0.5) * _unit(noise)
