"""95 % intervals of shares: Wilson's, Wilson's with images clustered by identity, and Clopper and Pearson's exact upper end."""

from __future__ import annotations

import numpy as np

CONFIDENCE = 0.95
_Z = 1.959963984540054
_TAIL = (1 - CONFIDENCE) / 2
_HALVINGS = 60
"""Of [0, 1] in search of a root: more than the digits of float64."""


def wilson(hits: np.ndarray, queries: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share (doi 10.1080/01621459.1927.10502953): sensible also at 0 and 1 and for few queries.

    Args:
        hits: numbers in 0 .. queries, any shape; not whole where they come of an effective number of queries.
        queries: number of trials, one for all or of the same shape; 0 gives the interval [0, 1].

    Returns:
        Lower and upper ends, float64 in [0, 1], of the shape of ``hits``.
    """
    trials = np.where(np.greater(queries, 0), queries, 1.0)
    share, square = np.asarray(hits) / trials, _Z**2 / trials
    center = (share + square / 2) / (1 + square)
    half = np.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    # rounding must not leave a share of exactly 0 or 1 outside its own interval
    low = np.where(np.equal(hits, 0), 0.0, np.maximum(center - half, 0.0))
    high = np.where(np.equal(hits, queries), 1.0, np.minimum(center + half, 1.0))
    return low, high


def effective_queries(images: np.ndarray, hits: np.ndarray) -> float:
    """How many independent queries say as much as these, whose images come in identities: n / design effect.

    The design effect of a share p = sum(h) / n over identities with n_c images and h_c hits is the variance of the ratio estimator,
    sum((h_c - p n_c)^2) / n^2, divided by p (1 - p) / n, that of independent queries (Cochran, Sampling Techniques, section 9A). Where few
    are hit or few are missed, that variance says nothing yet about how hits cluster. So it is taken once with one more identity all of
    whose images are hit, and once with one all of whose images are missed, each of the size of a random image's identity, sum(n_c^2) / n,
    and the larger effect counts (our reading). With no hit at all the answer is n^2 / sum(n_c^2) (Kish, Survey Sampling): P identities of
    one size then count as P queries, however many images they have.

    Args:
        images: int64 (P,), queries of each identity, at least 1.
        hits: int64 (P,) or (P, K), those found, at each of K depths; the largest effect of all depths counts.

    Returns:
        A number in [0, n]; 0 only when there is no query.
    """
    num = len(images)
    if not num:
        return 0.0
    sizes, found = images.astype(np.float64)[:, None], hits.reshape(num, -1).astype(np.float64)
    total = sizes.sum()
    typical = (sizes**2).sum() / total
    effects = []
    for more in (typical, 0.0):
        share = (found.sum(axis=0) + more) / (total + typical)
        spread = ((found - share * sizes) ** 2).sum(axis=0) + (more - share * typical) ** 2
        binomial = (total + typical) * share * (1 - share)
        effects.append(np.divide(spread, binomial, out=np.ones_like(spread), where=binomial > 0))
    return float(total / max(1.0, np.max(effects)))


def clustered(hits: np.ndarray, queries: int, effective: float) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of hits / queries as if ``effective`` independent queries had given that share.

    One ``effective`` for all hits keeps the ends in the order of the shares. Returns lower and upper ends, float64 in [0, 1].
    """
    share = np.asarray(hits) / max(queries, 1)
    low, high = wilson(share * effective, effective)
    return np.where(np.equal(hits, 0), 0.0, low), np.where(np.equal(hits, queries), 1.0, high)


def clopper_pearson_high(hits: int, queries: int) -> float:
    """Upper end of Clopper and Pearson's 95 % interval (doi 10.1093/biomet/26.4.404): the share at which so few hits have 2.5 % chance.

    It covers at least what it says for every share and number of queries. Returns 1 without queries.

    Raises:
        ValueError: hits are not in 0 .. queries.
    """
    if not 0 <= hits <= queries:
        raise ValueError(f"{hits} hits of {queries} queries: they must lie in 0 to {queries}")
    if hits == queries:
        return 1.0
    counts = np.arange(1, hits + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((queries + 1 - counts) / counts))])  # log C(queries, i)
    successes = np.arange(hits + 1)
    low, high = hits / queries, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        terms = ways + successes * np.log(middle) + (queries - successes) * np.log1p(-middle)
        chance = np.exp(terms - terms.max()).sum() * np.exp(terms.max())
        low, high = (middle, high) if chance > _TAIL else (low, middle)
    return high
