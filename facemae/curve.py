"""CMC curves as counts on a fixed grid of depths: additive, with intervals and chance at each depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from facemae.chance import chance_identity, chance_image
from facemae.interval import clustered
from facemae.rank import UNDEFINED
from facemae.risk import Risk

DEPTH = 10
"""Up to here the curve has every depth, beyond it three a decade."""


def depths(num_gallery: int) -> np.ndarray:
    """The k of a curve's CMC@k: 1 to 10, then 20, 50, 100, 200, 500 ... below the gallery's size, and that size. int64 (K,), ascending."""
    steps = (factor * 10**power for power in range(1, len(str(num_gallery)) + 1) for factor in (1, 2, 5))
    beyond = [k for k in steps if DEPTH < k < num_gallery]
    return np.array([*range(1, DEPTH + 1), *beyond, *([num_gallery] if num_gallery > DEPTH else [])], np.int64)


@dataclass(frozen=True)
class Curve:
    """A CMC curve as counts.

    Attributes:
        queries: queries with a mate.
        depths: int64 (K,), the grid of ``depths``.
        hits: int64 (K,), queries whose rank is at most that.
        risk: the same by identity.
        others: int64 (M,), entry m counts the queries with m mates; None where each query has exactly one, its own source image.
    """

    queries: int
    depths: np.ndarray
    hits: np.ndarray
    risk: Risk
    others: np.ndarray | None = None

    @classmethod
    def of(cls, ranks: np.ndarray, identities: np.ndarray, num_gallery: int, others: np.ndarray | None = None) -> Curve:
        """From ranks (N,), labels (N,) and, for an identity curve, the number of mates (N,) of each query.

        Raises:
            ValueError: a rank is neither UNDEFINED nor in 1 .. num_gallery.
        """
        defined = ranks != UNDEFINED
        found, grid = ranks[defined], depths(num_gallery)
        if len(found) and not (found.min() >= 1 and found.max() <= num_gallery):
            raise ValueError(f"ranks must be {UNDEFINED} or 1 to {num_gallery}, the gallery's size, found {found.min()} to {found.max()}")
        hits = np.cumsum(np.bincount(np.searchsorted(grid, found), minlength=len(grid))).astype(np.int64)
        mates = None if others is None else np.bincount(others[defined]).astype(np.int64)
        return cls(len(found), grid, hits, Risk.of(identities[defined], found), mates)

    @classmethod
    def merge(cls, parts: Sequence[Curve]) -> Curve:
        """The curve of all parts' queries.

        Raises:
            ValueError: there is no part, or two are of galleries of different sizes.
        """
        if not parts:
            raise ValueError("no curve to merge: no shard was searched")
        sizes = {int(part.depths[-1]) for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"curves of galleries of different sizes ({sorted(sizes)}) do not add up: search all shards in one gallery")
        others = None
        if parts[0].others is not None:
            lists = [part.others for part in parts if part.others is not None]
            others = np.zeros(max(map(len, lists)), np.int64)
            for counts in lists:
                others[: len(counts)] += counts
        hits = np.sum([part.hits for part in parts], axis=0)
        return cls(sum(part.queries for part in parts), parts[0].depths, hits, Risk.merge([part.risk for part in parts]), others)

    @property
    def cmc(self) -> np.ndarray:
        """CMC at each depth, float64 (K,) in [0, 1]; zeros without queries."""
        return self.hits / max(self.queries, 1)

    @property
    def effective_queries(self) -> float:
        """Independent queries that say as much as these, whose images come in identities."""
        return self.risk.effective_queries

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the 95 % interval at each depth, clustered by identity, float64 (K,).

        One number of effective queries serves all depths, that of the largest design effect at 1, 5 and 10 (our reading).
        """
        return clustered(self.hits, self.queries, self.effective_queries)

    def chance(self, num_gallery: int) -> np.ndarray:
        """The CMC of guessing in a gallery of this size, float64 (K,)."""
        return chance_image(num_gallery, self.depths) if self.others is None else chance_identity(num_gallery, self.others, self.depths)

    def to_json(self, num_gallery: int) -> dict[str, Any] | None:
        """Counts, CMC, interval and chance at each depth, and the risk by identity; None without queries."""
        if self.queries == 0:
            return None
        low, high = self.interval
        arrays = {"depths": self.depths, "hits": self.hits, "cmc": self.cmc, "low": low, "high": high, "chance": self.chance(num_gallery)}
        return {
            "queries": self.queries,
            "effective_queries": self.effective_queries,
            **{name: values.tolist() for name, values in arrays.items()},
            "by_identity": self.risk.to_json(),
        }
