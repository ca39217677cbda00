"""How far an approximate search overstates the leakage: what an exact search of a random sample of its queries says.

An approximate search can only overlook items nearer than the mate, so every rank is a lower bound and the CMC an upper bound. The share of
the sample that it puts at rank 1 and an exact search does not bounds the difference from the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from facemae.curve import Curve
from facemae.interval import clopper_pearson_high

NOT_SAMPLED = 0
"""The exact rank of a query outside the sample."""
_UNIT = 1 << 40
"""Ratios are added as whole multiples of 2^-40, so that any split into parts gives the same sum."""


@dataclass(frozen=True)
class Tightness:
    """Approximate against exact ranks of one kind of mate, over the sampled queries that have one. Additive.

    Attributes:
        queries: sampled queries with a mate.
        hits: those that the approximate search puts at rank 1.
        exact_hits: those among them that are at rank 1.
        behind: queries not at rank 1, so that there are nearer items to be found.
        nearer: over these, the sum of the share of nearer items that were found, in units of 2^-40.
    """

    queries: int = 0
    hits: int = 0
    exact_hits: int = 0
    behind: int = 0
    nearer: int = 0

    @classmethod
    def of(cls, ranks: np.ndarray, exact: np.ndarray) -> Tightness:
        """From ranks (N,) of the approximate search and exact ones (N,): NOT_SAMPLED, UNDEFINED or true ranks.

        Raises:
            ValueError: an approximate rank is above the exact one, which no search that only overlooks items can give.
        """
        sampled = exact > NOT_SAMPLED
        found, true = ranks[sampled], exact[sampled]
        wrong = np.flatnonzero((found > true) | (found < 1))
        if len(wrong):
            raise ValueError(
                f"rank {found[wrong[0]]} of a search whose exact rank is {true[wrong[0]]}: the two are not of the same queries and "
                "gallery, search them again"
            )
        behind = true > 1
        ratio = (found[behind] - 1) / (true[behind] - 1)
        nearer = int(np.rint(ratio * _UNIT).astype(np.int64).sum())
        return cls(len(true), int(np.sum(found == 1)), int(np.sum(true == 1)), int(behind.sum()), nearer)

    @classmethod
    def merge(cls, parts: Sequence[Tightness]) -> Tightness:
        """The sum of all parts."""
        return cls(*(sum(getattr(part, name) for part in parts) for name in cls.__dataclass_fields__))

    @property
    def false_hits_high(self) -> float:
        """Upper end of the share of queries that are at rank 1 by the approximate search alone (Clopper and Pearson, 97.5 %)."""
        return clopper_pearson_high(self.hits - self.exact_hits, self.queries)

    def bounds(self, curve: Curve) -> tuple[float, float]:
        """Lower and upper end of the true CMC@1 of which ``curve`` is the approximate search's upper bound.

        The upper end is the curve's own, of 97.5 %. The lower end is the curve's lower end less the upper end of the false hits: two ends
        of 97.5 % each, so at least 95 % (Bonferroni). It takes a simple random sample of the search's queries.
        """
        low, high = curve.interval
        return max(0.0, float(low[0]) - self.false_hits_high), float(high[0])

    def to_json(self, curve: Curve) -> dict[str, Any] | None:
        """The counts, the upper end of the false hits, the mean share of nearer items found, and the bounds; None without queries."""
        if self.queries == 0:
            return None
        low, high = self.bounds(curve)
        return {
            "queries": self.queries,
            "hits": self.hits,
            "exact_hits": self.exact_hits,
            "false_hits_high": self.false_hits_high,
            "nearer_found": self.nearer / _UNIT / self.behind if self.behind else None,
            "bounds": {"low": low, "high": high},
        }


@dataclass(frozen=True)
class Sample:
    """What the exact search of a random sample of queries says of the approximate one. Additive.

    Attributes:
        queries: sampled queries.
        found: those whose most similar gallery image the approximate search found, or one as similar.
        image, identity: the ranks of the two mates.
    """

    queries: int = 0
    found: int = 0
    image: Tightness = Tightness()
    identity: Tightness = Tightness()

    @classmethod
    def of(cls, image: Tightness, identity: Tightness, top: np.ndarray, exact_top: np.ndarray) -> Sample:
        """From the two mates' ranks, and the similarity of the most similar item found (N,) and by exact search (N,), NaN: not sampled.

        Raises:
            ValueError: something more similar was found than there is.
        """
        sampled = ~np.isnan(exact_top)
        if (top[sampled] > exact_top[sampled]).any():
            raise ValueError("the approximate search found a more similar item than the exact one: they are not of the same gallery")
        return cls(int(sampled.sum()), int(np.sum(top[sampled] >= exact_top[sampled])), image, identity)

    @classmethod
    def merge(cls, parts: Sequence[Sample]) -> Sample:
        """The sum of all parts."""
        mates = (Tightness.merge([getattr(part, name) for part in parts]) for name in ("image", "identity"))
        return cls(sum(part.queries for part in parts), sum(part.found for part in parts), *mates)

    def to_json(self, image: Curve, identity: Curve) -> dict[str, Any] | None:
        """Sampled queries, recall@1 with its counts, and each mate's bounds; None where nothing was sampled: the search was exact."""
        if self.queries == 0:
            return None
        return {
            "queries": self.queries,
            "found": self.found,
            "recall_at_1": self.found / self.queries,
            "image": self.image.to_json(image),
            "identity": self.identity.to_json(identity),
        }
