"""The CMC of an attacker who guesses."""

from __future__ import annotations

import numpy as np


def chance_image(num_gallery: int, depths: np.ndarray) -> np.ndarray:
    """Chance of one given image among k drawn: k/N, float64 (K,) for depths int64 (K,)."""
    return np.minimum(depths / max(num_gallery, 1), 1.0)


def chance_identity(num_gallery: int, others: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Chance of any image of the identity among k drawn: mean over the queries of 1 - C(N-1-m, k) / C(N-1, k).

    That quotient equals C(N-1-k, m) / C(N-1, m), the product over i < m of 1 - k / (N-1-i): it needs no factor for each of up to N draws,
    and unlike a difference of lgamma it keeps all its digits where m is small against N.

    Args:
        num_gallery: N, the query's own source included (it is left out of the draw).
        others: int64 (M,), entry m counts the queries whose identity has m other images in the gallery; m = 0 takes no part.
        depths: int64 (K,), the k.

    Returns:
        float64 (K,), zeros when no query has another image.
    """
    weights = others[1:].astype(np.float64)
    if not weights.sum():
        return np.zeros(len(depths))
    left = np.maximum(num_gallery - 1 - np.arange(len(weights)), 1e-9)  # where the next mate may lie
    with np.errstate(divide="ignore"):  # log(0): all is drawn, and the chance is 1
        missed = np.log1p(-np.minimum(depths / left[:, None], 1.0))
    chance = -np.expm1(np.cumsum(missed, axis=0))
    return weights @ chance / weights.sum()
