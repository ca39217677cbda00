"""Leakage statistics: ranks, CMC curves with intervals and chance levels, and the people who are traced most. numpy only.

A query is a protected image, the gallery holds the originals. The rank of a query's mate is 1 + the number of gallery items that are
*strictly* more similar than the mate: a tie counts for the attacker, the reading that never understates the leakage. Curves, risks and
histograms are additive: what many shards say is the ``merge`` of what each says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DEPTH = 10
"""The largest k of CMC@k."""
BEYOND = 0
"""The rank of a mate that is not among the ``depth`` nearest."""
UNDEFINED = -1
"""The rank where there is no mate: the identity has no other image, or the search leaves the same image out."""
NUM_BINS = 200
HISTOGRAM_RANGE = (-1.0, 1.0)
CONFIDENCE = 0.95
_Z = 1.959963984540054
_QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine similarities of rows, free of rounding until the last step.

    For float16 unit rows every product and partial sum is a multiple of 2^-48 below 2^2, which float64 holds exactly: the result does not
    depend on the order of summation, so neither on batch size, threads nor machine, and equal pairs tie exactly.

    Args:
        left, right: (..., D) unit rows, float16 (or float32, then exact to about 1e-15 before the last rounding); they broadcast.

    Returns:
        float32 (...).
    """
    return np.einsum("...d,...d->...", left.astype(np.float64), right.astype(np.float64)).astype(np.float32)


def ranks(scores: np.ndarray, mate: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """Ranks of the mates in lists of the most similar gallery items.

    Args:
        scores: float32 (Q, K), similarities of the K most similar items in any order, at least ``depth`` of them or the whole gallery;
            -inf for an item that does not take part. The mate itself may be among them or not.
        mate: float32 (Q,), similarity of the mate, NaN where there is none.

    Returns:
        int32 (Q,): 1 + the number of items strictly more similar; BEYOND above ``depth``, UNDEFINED where there is no mate.
    """
    more = np.count_nonzero(scores > mate[:, None], axis=1)
    rank = np.where(more < depth, more + 1, BEYOND)
    return np.where(np.isnan(mate), UNDEFINED, rank).astype(np.int32)


def wilson(hits: np.ndarray, queries: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share (doi 10.1080/01621459.1927.10502953): sensible also at 0 and 1 and for few queries.

    Args:
        hits: integers in 0 .. queries, any shape.
        queries: number of trials, one for all or of the same shape; 0 gives the interval [0, 1].

    Returns:
        Lower and upper ends, float64 in [0, 1], of the shape of ``hits``.
    """
    trials = np.maximum(queries, 1)
    share, square = np.asarray(hits) / trials, _Z**2 / trials
    centre = (share + square / 2) / (1 + square)
    half = np.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    # rounding must not leave a share of exactly 0 or 1 outside its own interval
    low = np.where(np.equal(hits, 0), 0.0, centre - half)
    high = np.where(np.equal(hits, queries), 1.0, centre + half)
    return low, high


def chance_image(num_gallery: int, depth: int = DEPTH) -> np.ndarray:
    """CMC@1 .. CMC@depth of an attacker who guesses: k/N, float64 (depth,)."""
    return np.minimum(np.arange(1, depth + 1) / max(num_gallery, 1), 1.0)


def chance_identity(num_gallery: int, others: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """The same for the identity: mean over the queries of 1 - C(N-1-m, k)/C(N-1, k), in log space.

    Args:
        num_gallery: N, the query's own source included (it is left out of the draw).
        others: int64 (M,), entry m counts the queries whose identity has m other images in the gallery; m = 0 takes no part.

    Returns:
        float64 (depth,), zeros when no query has another image.
    """
    left = np.maximum(num_gallery - 1 - np.arange(depth), 1e-9)  # items still in the urn at each draw
    with np.errstate(divide="ignore"):  # log(0): nothing but mates is left, and the chance is 1
        missed = np.log1p(-np.minimum(np.arange(1, len(others))[:, None] / left, 1.0))
    chance = -np.expm1(np.cumsum(missed, axis=1))
    weights = others[1:].astype(np.float64)
    return weights @ chance / weights.sum() if weights.sum() else np.zeros(depth)


def histogram(similarities: np.ndarray) -> np.ndarray:
    """Counts in NUM_BINS equal bins over [-1, 1], int64 (200,); a value outside by rounding falls in the end bin."""
    return np.histogram(np.clip(similarities, *HISTOGRAM_RANGE), NUM_BINS, HISTOGRAM_RANGE)[0].astype(np.int64)


def add_histograms(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sum by name of the histograms of many shards."""
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for name, counts in part.items():
            total[name] = total.get(name, 0) + np.asarray(counts, np.int64)
    return total


@dataclass(frozen=True)
class Risk:
    """How many of each identity's images were traced at rank 1.

    Attributes:
        labels: int64 (P,), distinct identities, ascending.
        images, traced: int64 (P,), its queries, and those among them of rank 1.
    """

    labels: np.ndarray
    images: np.ndarray
    traced: np.ndarray

    @classmethod
    def of(cls, identities: np.ndarray, traced: np.ndarray, images: np.ndarray | None = None) -> Risk:
        """Sum by identity: ``traced`` (N,) bool or counts, ``images`` (N,) counts (default: each row is one image)."""
        labels, place = np.unique(identities, return_inverse=True)
        images = np.ones(len(identities), np.int64) if images is None else images
        totals = [np.bincount(place, weights, len(labels)).astype(np.int64) for weights in (images, traced)]
        return cls(labels.astype(np.int64), *totals)

    @classmethod
    def merge(cls, parts: Sequence[Risk]) -> Risk:
        """The risk over all parts; an identity may be in several."""
        joined = [np.concatenate([getattr(part, name) for part in parts] or [[]]) for name in ("labels", "traced", "images")]
        return cls.of(*joined)

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


@dataclass(frozen=True)
class Curve:
    """A CMC curve as counts.

    Attributes:
        queries: queries with a mate.
        hits: int64 (depth,), queries whose rank is at most 1 .. depth.
        risk: the same at rank 1, by identity.
        others: int64 (M,), entry m counts the queries with m mates; None where each query has exactly one, its own source image.
    """

    queries: int
    hits: np.ndarray
    risk: Risk
    others: np.ndarray | None = None

    @classmethod
    def of(cls, ranks: np.ndarray, identities: np.ndarray, others: np.ndarray | None = None, depth: int = DEPTH) -> Curve:
        """From ranks (N,), labels (N,) and, for an identity curve, the number of mates (N,) of each query.

        Raises:
            ValueError: a rank is neither in 1 .. depth nor BEYOND nor UNDEFINED.
        """
        if len(ranks) and not (ranks.min() >= UNDEFINED and ranks.max() <= depth):
            raise ValueError(f"ranks must be {UNDEFINED}, {BEYOND} or 1 to {depth}, found {ranks.min()} to {ranks.max()}")
        defined = ranks != UNDEFINED
        counts = np.bincount(ranks[defined], minlength=depth + 1)
        mates = None if others is None else np.bincount(others[defined]).astype(np.int64)
        risk = Risk.of(identities[defined], ranks[defined] == 1)
        return cls(int(counts.sum()), np.cumsum(counts[1:]).astype(np.int64), risk, mates)

    @classmethod
    def merge(cls, parts: Sequence[Curve]) -> Curve:
        """The curve of all parts' queries. Raises ValueError when there is no part."""
        if not parts:
            raise ValueError("no curve to merge: no shard was searched")
        others = None
        if parts[0].others is not None:
            lists = [part.others for part in parts if part.others is not None]
            others = np.zeros(max(map(len, lists)), np.int64)
            for counts in lists:
                others[: len(counts)] += counts
        risk = Risk.merge([part.risk for part in parts])
        return cls(sum(part.queries for part in parts), np.sum([part.hits for part in parts], axis=0), risk, others)

    @property
    def cmc(self) -> np.ndarray:
        """CMC@1 .. CMC@depth, float64 (depth,) in [0, 1]; zeros without queries."""
        return self.hits / max(self.queries, 1)

    def chance(self, num_gallery: int) -> np.ndarray:
        """The CMC of guessing in a gallery of this size, float64 (depth,)."""
        depth = len(self.hits)
        return chance_image(num_gallery, depth) if self.others is None else chance_identity(num_gallery, self.others, depth)

    def to_json(self, num_gallery: int) -> dict[str, Any] | None:
        """Counts, CMC, interval and chance at each k from 1, and the risk by identity; None without queries."""
        if self.queries == 0:
            return None
        low, high = wilson(self.hits, self.queries)
        arrays = {"hits": self.hits, "cmc": self.cmc, "low": low, "high": high, "chance": self.chance(num_gallery)}
        return {"queries": self.queries, **{name: a.tolist() for name, a in arrays.items()}, "by_identity": self.risk.to_json()}


@dataclass(frozen=True)
class Leakage:
    """What one search found: a CMC curve for the same image and one for the same identity, and similarity histograms.

    Attributes:
        image: mate = the query's own source image; without queries where the search leaves it out.
        identity: mate = the most similar *other* image of the same identity.
        histograms: name -> int64 (200,): "mate", "genuine", "impostor".
    """

    image: Curve
    identity: Curve
    histograms: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def merge(cls, parts: Sequence[Leakage]) -> Leakage:
        """What all parts together say. Raises ValueError when there is no part."""
        image, identity = Curve.merge([part.image for part in parts]), Curve.merge([part.identity for part in parts])
        return cls(image, identity, add_histograms(part.histograms for part in parts))

    def to_json(self, num_gallery: int) -> dict[str, Any]:
        """The search's part of leakage.json."""
        return {
            "gallery": num_gallery,
            "image": self.image.to_json(num_gallery),
            "identity": self.identity.to_json(num_gallery),
            "histograms": {name: self.histograms[name].tolist() for name in sorted(self.histograms)},
        }
