"""Who is traced: the share of each identity's images, its tail, and what the spread over identities says of the interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from facemae.interval import effective_queries, wilson

RISK_DEPTHS = (1, 5, 10)
"""The ranks up to which hits are kept for each identity."""
_QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Risk:
    """How many of each identity's images were found near the top. Additive.

    Attributes:
        labels: int64 (P,), distinct identities, ascending.
        images: int64 (P,), its queries.
        hits: int64 (P, 3), those among them of a rank of at most 1, 5 and 10.
    """

    labels: np.ndarray
    images: np.ndarray
    hits: np.ndarray

    @classmethod
    def of(cls, identities: np.ndarray, ranks: np.ndarray) -> Risk:
        """From labels (N,) and ranks (N,), all defined: each row is one image."""
        return cls._sum(identities, np.ones(len(ranks), np.int64), np.reshape(ranks, (-1, 1)) <= np.array(RISK_DEPTHS))

    @classmethod
    def merge(cls, parts: Sequence[Risk]) -> Risk:
        """The risk over all parts; an identity may be in several. Raises ValueError when there is no part."""
        if not parts:
            raise ValueError("no risk to merge: no shard was searched")
        labels, images, hits = (np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "images", "hits"))
        return cls._sum(labels, images, hits)

    @classmethod
    def _sum(cls, labels: np.ndarray, images: np.ndarray, hits: np.ndarray) -> Risk:
        """Rows of one identity become one."""
        distinct, place = np.unique(labels, return_inverse=True)
        counts = [np.bincount(place, column, len(distinct)).astype(np.int64) for column in (images, *hits.T)]
        return cls(distinct.astype(np.int64), counts[0], np.stack(counts[1:], axis=1))

    @property
    def traced(self) -> np.ndarray:
        """int64 (P,), images of rank 1."""
        return self.hits[:, 0]

    @property
    def effective_queries(self) -> float:
        """Independent queries that say as much; the largest design effect of the three depths."""
        return effective_queries(self.images, self.hits)

    def worst(self, count: int = 20) -> list[dict[str, Any]]:
        """The identities traced most surely: by the lower end of the share's interval, so that 1 of 1 is not worse than 19 of 20."""
        order = np.lexsort((self.labels, -self.images, -wilson(self.traced, self.images)[0]))[:count]
        rows = zip(self.labels[order].tolist(), self.images[order].tolist(), self.traced[order].tolist(), strict=True)
        return [{"identity": label, "images": n, "traced": traced, "share": traced / n} for label, n, traced in rows if traced]

    def to_json(self) -> dict[str, Any]:
        """Number of identities, those traced at least once and always, the mean and the tail of the traced share, the worst."""
        share = self.traced / np.maximum(self.images, 1)
        quantiles = np.quantile(share, _QUANTILES, method="inverted_cdf") if len(share) else np.zeros(len(_QUANTILES))
        return {
            "identities": len(self.labels),
            "traced_once": int(np.count_nonzero(self.traced)),
            "traced_always": int(np.count_nonzero(self.traced == self.images)),
            "mean_share": float(share.mean()) if len(share) else 0.0,
            "share_quantiles": {f"{q:g}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)},
            "worst": self.worst(),
        }
